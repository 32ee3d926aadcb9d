"""Sources of the training data: their shares, sequences and options."""

import numpy as np
import pytest

from dualsm.config import add_pair, add_source, check_config, difference, load_config, save_config
from dualsm.data.document_lengths import DocumentLengths
from dualsm.data.sequence_order import SequenceOrder
from dualsm.objectives.mixture import sequence_counts
from dualsm.objectives.plan import MixturePlan
from dualsm.objectives.shares import trained_entries, trained_objectives
from dualsm.objectives.sources import Source, trained_sources
from dualsm.process.errors import UserError
from tests.micro import micro_config
from tests.micro_sources import two_sources


def random_config(rng, pairs: bool):
    """Returns a config with random sources, some with a mixture of their own or without a share."""
    config = micro_config()
    config.steps, config.batch_size = 40, 2 * int(rng.integers(1, 12))
    names = ["causal", "prefix", "masked_diffusion", *(["mir", "nemotron"] if pairs else [])]
    config.mixture.update(dict(zip(names, rng.dirichlet(np.ones(len(names))).tolist(), strict=True)))
    shares = rng.dirichlet(np.full(rng.integers(1, 5), rng.choice([0.3, 1, 5]))).tolist()
    for k, share in enumerate(shares):
        own = rng.choice(names, rng.integers(1, 4), replace=False)
        mixture = dict(zip(own.tolist(), rng.dirichlet(np.ones(len(own))).tolist(), strict=True))
        add_source(config, f"s{k}", "x", share, repetitions=1, mixture=mixture if k % 2 else None)
    return config


@pytest.mark.parametrize("pairs", [False, True])
def test_shares_of_sources_and_of_their_objectives_are_exact_after_any_number_of_steps(pairs):
    rng = np.random.default_rng(0)
    unit = 2 if pairs else 1  # rows of the largest sequence
    for _ in range(40):
        config = random_config(rng, pairs)
        check_config(config)
        plan = MixturePlan(config)
        rows_SxJ = np.diff([plan.member_rows(step) for step in range(config.steps + 1)], axis=0)
        assert (rows_SxJ >= 0).all() and (rows_SxJ.sum(1) == config.batch_size).all()
        source_J = np.array(plan.member_sources)
        for source in plan.sources:
            mine_S = rows_SxJ[:, source_J == source.name].sum(1).cumsum()
            exact_S = np.arange(1, 41) * config.batch_size * config.sources[source.name].share
            assert np.abs(mine_S - exact_S).max() < unit
            own = config.sources[source.name].mixture
            shares = own if any(own.values()) else config.mixture
            for entry in (entry for entry in plan.entries if entry.source == source.name):
                names = {member.name for member in entry.members}
                of_entry = [
                    m.name in names and s == source.name for m, s in zip(plan.members, source_J, strict=True)
                ]
                entry_S = rows_SxJ[:, of_entry].sum(1).cumsum()
                assert np.abs(entry_S - mine_S * shares[entry.name]).max() < unit


@pytest.mark.parametrize("small", [0.25, 0.3, None])
def test_any_window_of_steps_is_within_two_sequences_of_the_share(small):
    """None: random shares of two or three sources."""
    rng = np.random.default_rng(0)
    for _ in range(1 if small else 20):
        config = two_sources()
        config.steps, shares = 30, [small, 1 - small] if small else []
        if not small:
            config.batch_size = int(rng.integers(1, 12))
            if rng.random() < 0.5:
                add_source(config, "third", "x", 0.0, repetitions=1)
            shares = rng.dirichlet(np.ones(len(config.sources))).tolist()
        for name, share in zip(config.sources, shares, strict=True):
            config.sources[name].share = share
        plan = MixturePlan(config)
        rows_SxK = np.array([plan.source_sequences(step) for step in range(31)])
        share_K = np.array([config.sources[source.name].share for source in plan.sources])
        ahead_SxK = rows_SxK - np.arange(31)[:, None] * config.batch_size * share_K
        assert np.abs(ahead_SxK[:, None] - ahead_SxK[None, :]).max() < 2


def test_rows_of_a_varying_number_of_sequences_follow_the_shares():
    rng = np.random.default_rng(1)
    rows_S = rng.integers(0, 5, 200)
    shares = np.tile([0.6, 0.3, 0.1], (200, 1))
    counts_SxE = sequence_counts(shares, rows_S)
    assert (counts_SxE.sum(1) == rows_S).all()
    assert np.abs(counts_SxE.cumsum(0) - rows_S.cumsum()[:, None] * [0.6, 0.3, 0.1]).max() < 1


@pytest.mark.parametrize(
    "mixture", [{"causal": 1.0}, {"mir": 0.5, "nemotron": 0.5}, {"causal": 0.4, "mir": 0.6}]
)
def test_every_source_is_read_in_order_and_once(mixture):
    config = two_sources()
    config.sources.small.mixture.update(dict.fromkeys(config.mixture, 0.0) | mixture)
    plan = MixturePlan(config)
    read = [[], []]
    for step in range(config.steps):
        assert plan.source_sequences(step) == [len(indices) for indices in read]
        source_B, index_B = plan.row_sources(step)
        assert np.bincount(source_B, minlength=2).sum() == config.batch_size
        for k in (0, 1):
            read[k] += np.unique(index_B[source_B == k]).tolist()
    assert [read[k] == list(range(n)) for k, n in enumerate(plan.source_sequences(config.steps))] == [
        True
    ] * 2
    assert plan.num_sequences == sum(map(len, read))


def test_both_rows_of_a_pair_are_the_same_sequence_of_the_same_source():
    config = two_sources()
    config.sources.small.mixture.update(dict.fromkeys(config.mixture, 0.0) | {"mir": 1.0})
    plan = MixturePlan(config)
    for step in range(config.steps):
        source_B, index_B = plan.row_sources(step)
        objective_B, _, _ = plan.assign(step)
        names = [(plan.member_sources[j], plan.members[j].name) for j in objective_B]
        assert [source for source, _ in names] == [plan.sources[k].name for k in source_B]
        by_member = [
            index_B[[name == ("small", f"mir/{o}") for name in names]].tolist()
            for o in ("causal", "masked_input_causal")
        ]
        assert by_member[0] == by_member[1] and len(by_member[0]) == 1


@pytest.mark.parametrize("repetitions", [1, 3, 8])
def test_each_unique_token_of_a_source_is_read_exactly_r_times(repetitions):
    config = two_sources()
    config.steps, config.batch_size, config.sources.small.repetitions = 24, 6, repetitions
    config.sources.small.share, config.sources.large.share = 1 / 3, 2 / 3
    plan, lengths = MixturePlan(config), DocumentLengths.from_array([37] * 200)
    (_, large), (_, small) = zip("ls", plan.source_sequences(config.steps), strict=True)
    orders = [SequenceOrder(lengths, n * 32, 32, r, 0) for n, r in ((large, 1), (small, repetitions))]
    seen = [np.zeros((200, 37), int), np.zeros((200, 37), int)]
    for step in range(config.steps):
        source_B, index_B = plan.row_sources(step)
        for k in (0, 1):
            segments = orders[k].segments(index_B[source_B == k])
            ends_S = np.cumsum(segments.stop_S - segments.start_S)
            for s, (row, document, start, stop) in enumerate(zip(*segments[:4], strict=True)):
                is_last = s + 1 == len(ends_S) or segments.row_S[s + 1] != row
                full = (segments.stop_S - segments.start_S)[segments.row_S == row].sum() == 33
                seen[k][document, start : stop - (is_last and full)] += 1  # without the last target
    for k, r in ((0, 1), (1, repetitions)):
        flat, unique = seen[k].ravel(), orders[k].unique
        assert (flat[:unique] == r).all() and (flat[unique:] == 0).all()


def test_unique_tokens_determine_the_passes():
    lengths = DocumentLengths.from_array([10] * 50)
    order = SequenceOrder(lengths, 400, 10, seed=0, unique=160)  # 2.5 passes
    assert order.unique == 160
    segments = order.segments(np.arange(40))
    assert set(segments.document_S.tolist()) == set(range(16))
    with pytest.raises(UserError, match="needs 700 unique"):
        SequenceOrder(lengths, 1400, 10, seed=0, unique=700)


def test_one_source_is_planned_like_a_run_without_sources():
    plain, one = micro_config(), micro_config()
    for config in (plain, one):
        config.mixture.update(causal=0.25, prefix=0.0, masked_diffusion=0.25, mir=0.5)
    add_source(one, "all", "x", 1.0, repetitions=1)
    a, b = MixturePlan(plain), MixturePlan(one)
    for step in range(plain.steps):
        for found, expected in zip(
            (*a.assign(step), *a.row_sources(step)), (*b.assign(step), *b.row_sources(step)), strict=True
        ):
            np.testing.assert_array_equal(found, expected)
        first, read = a.sequences(step), np.unique(a.row_sources(step)[1])
        np.testing.assert_array_equal(read, np.arange(first, a.sequences(step + 1)))


def test_unique_tokens_are_rounded_up():
    """A source must have enough of them for the last, incomplete repetition."""
    for budget, repetitions, unique in ((10, 3, 4), (9, 3, 3), (1, 8, 1)):
        assert Source("s", "x", repetitions).unique(budget) == unique
    assert Source("s", "x", 0, unique_tokens=7).unique(10) == 7


def test_sequences_of_each_entry_have_all_strata():
    """The draws of a step are spread over the sequences of one objective of one source."""
    config = two_sources()
    config.batch_size = 16
    config.sources.small.mixture.update(dict.fromkeys(config.mixture, 0.0) | {"mir": 0.5, "causal": 0.5})
    plan = MixturePlan(config)
    for step in range(config.steps):
        objective_B, stratum_B, strata_B = plan.assign(step)
        for j in np.unique(objective_B):
            mine_B = objective_B == j
            assert sorted(stratum_B[mine_B]) == list(range(mine_B.sum()))
            assert (strata_B[mine_B] == mine_B.sum()).all()


def test_shares_of_sources_follow_a_schedule():
    config = two_sources()
    config.sources_schedule.name, config.sources_schedule.path = "steps", "0.5 large=1; 0.75 small=1"
    check_config(config)
    plan = MixturePlan(config)
    assert plan.source_sequences(6) == [36, 12]
    assert plan.source_sequences(9) == [36 + 24, 12]
    assert plan.source_sequences(12) == [36 + 24, 12 + 24]
    config.sources_schedule.name, config.sources_schedule.path = "linear", "1 small=0.75 large=0.25"
    assert MixturePlan(config).source_sequences(12) == [48, 48]


def test_sources_and_objectives_without_a_share_are_not_trained():
    config = two_sources()
    config.sources.small.share, config.sources.large.share = 0.0, 1.0
    check_config(config)
    assert [source.name for source in trained_sources(config)] == ["large"]
    assert [(e.source, e.name) for e in trained_entries(config)] == [
        ("large", "causal"),
        ("large", "masked_diffusion"),
    ]
    config.sources.large.mixture.prefix = 1.0
    assert trained_objectives(config) == ["prefix"]


def test_a_config_with_sources_is_saved_and_compared():
    config = load_config(save_config(two_sources()))
    check_config(config)
    run = config.copy_and_resolve_references()
    run.sources.small.identity, run.sources.small.corpus = "abc", "/elsewhere"
    assert difference(run, config) == []
    del config.sources.large.identity, config.sources.large.mixture  # keys of later versions
    check_config(config)
    assert difference(run, config) == []
    config.sources.small.identity, config.sources.large.share = "abd", 0.5
    assert difference(run, config) == [
        "sources.large.share: 0.75 -> 0.5",
        "sources.small.identity: abc -> abd",
    ]


ERRORS = {
    "shares": ({"sources.small.share": 0.5}, "the shares of config.sources sum to 1.25 .*must sum to 1"),
    "share": ({"sources.small.share": -0.5}, r"config.sources.small.share=-0.5 must be in \[0, 1\]"),
    "both": ({"sources.small.unique_tokens": 9.0}, "repetitions=4 and unique_tokens=9; set one of them"),
    "neither": ({"sources.small.repetitions": 0}, "repetitions=0 and unique_tokens=0; set one of them"),
    "fraction": (
        {"sources.small.unique_tokens": 9.5, "sources.small.repetitions": 0},
        "unique_tokens=9.5 must be a whole",
    ),
    "corpus": ({"sources.small.corpus": ""}, "config.sources.small.corpus is empty"),
    "path": ({"data.path": "x"}, "config.data.path=x is set beside config.sources"),
    "repetitions": ({"repetitions": 2}, "config.repetitions=2 has no effect with config.sources"),
    "mixture": ({"sources.small.mixture.causal": 0.25}, "config.sources.small.mixture sums to 0.75"),
    "schedule": ({"sources_schedule.name": "linear"}, "config.sources_schedule.name=linear needs a path"),
    "point": (
        {"sources_schedule.name": "steps", "sources_schedule.path": "0.5 tiny=1"},
        "unknown source 'tiny'",
    ),
    "type": ({"sources.small.share": "much"}, "config.sources.small.share='much' must be of type float"),
    "odd": (
        {"batch_size": 7, "sources.small.mixture.mir": 0.5, "sources.small.mixture.causal": 0.0},
        "must be even",
    ),
    "mixture schedule": (
        {
            "sources.large.mixture.causal": 1.0,
            "mixture_schedule.name": "steps",
            "mixture_schedule.path": "0.5 prefix=1",
        },
        "config.mixture_schedule.name=steps has no effect, because every source",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_invalid_sources_are_rejected_in_one_line(case):
    changes, message = ERRORS[case]
    config = two_sources()
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message) as error:
        check_config(config)
    assert "\n" not in str(error.value)


def test_unknown_keys_and_names_that_are_taken_are_rejected():
    config = two_sources()
    config.sources.small.weight = 1.0
    with pytest.raises(UserError, match="unknown config key config.sources.small.weight"):
        check_config(config)
    config = micro_config()
    config.sources.small = 0.5
    with pytest.raises(UserError, match="config.sources.small=0.5 must set corpus, share"):
        check_config(config)
    for name in ("causal", "mir", "ema", "not a name"):
        config = micro_config()
        with pytest.raises(UserError, match=f"config.sources.{name}: choose another name"):
            add_source(config, name, "x", 1.0, repetitions=1)
    config = micro_config()
    add_source(config, "both", "x", 1.0, repetitions=1)
    add_pair(config, "both", causal={"weight": 1.0}, prefix={"weight": 1.0})
    with pytest.raises(UserError, match="choose another name"):
        check_config(config)
    config = micro_config()
    config.sources_schedule.name = "linear"
    with pytest.raises(UserError, match="sources_schedule.name=linear has no effect without config.sources"):
        check_config(config)
