"""Pairs of objectives in the mixture: their rows, sequences and options."""

import numpy as np
import pytest

from dualsm.config import add_pair, check_config, load_config, save_config
from dualsm.objectives.mixture import assign, row_sequences, sequence_counts
from dualsm.objectives.plan import MixturePlan, count_sequences
from dualsm.objectives.shares import trained_entries, trained_objectives
from dualsm.process.errors import UserError
from tests.micro import micro_config


def paired(**shares: float):
    config = micro_config()
    for name in config.mixture:
        config.mixture[name] = shares.get(name, 0.0)
    return config


def test_any_number_of_steps_is_within_one_pair_of_the_exact_share():
    rng = np.random.default_rng(0)
    for _ in range(100):
        entries, batch_size = int(rng.integers(1, 6)), 2 * int(rng.integers(1, 20))
        shares, rows_E = rng.dirichlet(np.full(entries, 0.7)), rng.integers(1, 3, entries)
        counts_SxE = sequence_counts(np.tile(shares, (60, 1)), batch_size, rows_E)
        assert (counts_SxE >= 0).all()
        assert (counts_SxE @ rows_E == batch_size).all()
        exact_SxE = np.arange(1, 61)[:, None] * batch_size * shares
        assert np.abs((counts_SxE * rows_E).cumsum(0) - exact_SxE).max() < 2


def test_both_rows_of_a_pair_have_the_same_sequence_and_stratum():
    counts_E, rows_E = np.array([3, 5, 2]), [1, 2, 2]
    objective_B, stratum_B, strata_B = assign(counts_E, rows_E)
    sequence_B = row_sequences(counts_E, rows_E)
    assert sorted(set(sequence_B)) == list(range(10))
    for first in (1, 3):  # members of the pairs
        one, two = objective_B == first, objective_B == first + 1
        assert sequence_B[one].tolist() == sequence_B[two].tolist()
        assert stratum_B[one].tolist() == stratum_B[two].tolist() == list(range(one.sum()))
        assert (strata_B[one] == one.sum()).all() and (strata_B[two] == two.sum()).all()
    assert len(set(sequence_B[objective_B == 0])) == 3


def test_every_sequence_of_a_run_is_read_in_order_and_once():
    plan = MixturePlan(paired(mir=0.5, causal=0.25, nemotron=0.25))
    read = [np.unique(plan.row_sources(step)[1]) for step in range(12)]
    assert np.concatenate(read).tolist() == list(range(plan.num_sequences))
    assert plan.sequences(5) == sum(map(len, read[:5]))
    assert plan.num_sequences == 12 * (2 + 2 + 1)
    assert plan.member_rows(12).tolist() == [24, 24, 24, 12, 12]
    assert plan.member_rows(12).sum() == 12 * 8


def test_a_run_of_pairs_reads_half_as_many_sequences():
    assert count_sequences(paired(mir=1.0)) == 12 * 4
    assert count_sequences(paired(causal=1.0)) == 12 * 8


def test_members_have_the_options_of_the_pair_and_else_of_the_objective():
    config = paired(mir=0.5, nemotron=0.5)
    config.objectives.masked_diffusion.clip = 3.0
    config.objectives.causal.weight = 7.0  # of causal rows outside of pairs
    mir, nemotron = trained_entries(load_config(save_config(config)))
    assert [(m.name, m.weight) for m in mir.members] == [
        ("mir/causal", 1.0),
        ("mir/masked_input_causal", 0.4),
    ]
    assert mir.members[1].options == {"low": 0.0, "high": 0.5}
    assert [m.weight for m in nemotron.members] == [1.0, 0.3]
    assert nemotron.members[1].options["clip"] == 3.0
    assert trained_objectives(config) == ["causal", "masked_diffusion", "masked_input_causal"]


def test_pairs_can_be_added_and_scheduled():
    config = paired(causal=1.0)
    add_pair(config, "both", prefix={"weight": 1.0}, masked={"weight": 2.0, "span": 5})
    config.mixture_schedule.name, config.mixture_schedule.path = "steps", "0.5 both=1"
    check_config(config)
    causal, both = trained_entries(config)
    assert both.members[1].options["span"] == 5
    assert [MixturePlan(config).row_sources(s)[1].tolist() for s in (5, 6)] == [
        list(range(40, 48)),
        [48, 48, 49, 49, 50, 50, 51, 51],
    ]


def test_predefined_pairs_cannot_be_added():
    with pytest.raises(UserError, match="config.pairs.mir is predefined"):
        add_pair(paired(causal=1.0), "mir", causal={"weight": 1.0}, prefix={"weight": 1.0})


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"causal": {"weight": 1.0}}, "config.pairs.new has causal; set exactly two"),
        ({"causal": {"weight": 1.0}, "telepathy": {"weight": 1.0}}, "telepathy; set exactly two"),
        ({"causal": {}, "masked": {"weight": 1.0}}, "config.pairs.new.causal has no weight; set"),
        ({"causal": {"weight": 1.0}, "masked": {"weight": 1.0, "low": 0.1}}, "masked={.*} must set"),
        ({"causal": {"weight": -1.0}, "masked": {"weight": 1.0}}, "config.pairs.new.causal.weight=-1.0"),
        ({"causal": {"weight": "1"}, "masked": {"weight": 1.0}}, "must be of type float"),
        ({"causal": {"weight": 1.0}, "masked": {"weight": 1.0, "random": 0.95}}, "must not exceed 1"),
        (
            {"causal": {"weight": 1.0}, "masked_diffusion": {"weight": 1.0, "shifted": False}},
            "defines the task",
        ),
    ],
)
def test_invalid_pairs_are_rejected_by_name(members, message):
    config = paired(causal=1.0)
    add_pair(config, "new", **members)
    with pytest.raises(UserError, match=message) as error:
        check_config(config)
    assert "\n" not in str(error.value)


def test_names_and_batch_sizes_that_do_not_fit_are_rejected():
    config = paired(mir=1.0)
    config.batch_size = 7
    with pytest.raises(UserError, match="config.batch_size=7 must be even"):
        check_config(config)
    config = paired(causal=1.0)
    add_pair(config, "prefix", causal={"weight": 1.0}, masked={"weight": 1.0})
    with pytest.raises(UserError, match="config.pairs.prefix: choose another name"):
        check_config(config)
    config = paired(mir=1.0)
    config.repetitions = 49
    with pytest.raises(UserError, match="must not exceed the 48 sequences"):
        check_config(config)
