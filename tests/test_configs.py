"""Checks of config keys, and validity of all configs in `configs/`."""

import importlib.util
from pathlib import Path

import jax
import pytest

from dualsm.config import (
    check_config,
    default_config,
    difference,
    load_config,
    parse_arg,
    save_config,
    set_alpha,
)
from dualsm.config_keys import KEYS
from dualsm.data.corpus import Corpus
from dualsm.model.transformer import init_params
from dualsm.objectives.plan import MixturePlan
from dualsm.process.errors import UserError
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "configs").glob("*.py"))


def load(path: Path, arg: str = ""):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_config_is_valid_and_documents_its_command(path):
    check_config(load(path))
    assert f"--config=configs/{path.name}" in path.read_text().split('"""')[1]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_alpha_and_repetitions_are_arguments(path):
    config = load(path, "alpha=0.75,repetitions=32")
    check_config(config)
    repeated = config.sources.get("small", config)  # of several sources, the small one repeats
    shares = {name: share for name, share in repeated.mixture.items() if share}
    assert shares == {"causal": 0.75, "masked_diffusion": 0.25}
    assert repeated.repetitions == 32


def test_adapt_takes_the_architecture_of_the_imported_run(tmp_path):
    imported = default_config()
    imported.model.update({"d_model": 96, "num_heads": 6, "num_kv_heads": 2, "tie_word_embeddings": True})
    (tmp_path / "config.json").write_text(save_config(imported))
    config = load(ROOT / "configs" / "adapt.py", f"run={tmp_path}")
    check_config(config)
    assert config.model.to_dict() == imported.model.to_dict()
    assert config.start.run == str(tmp_path)
    with pytest.raises(UserError, match="no run at"):
        load(ROOT / "configs" / "adapt.py", f"run={tmp_path / 'missing'}")


def test_babylm_reads_the_corpus(corpus_path):
    """The run is 10 epochs, up to less than one step; the corpus is too small for a milestone."""
    tokens = Corpus(str(corpus_path)).manifest["splits"]["train"]["tokens"]
    config = load(ROOT / "configs" / "babylm.py", f"corpus={corpus_path}")
    check_config(config)
    per_step = config.batch_size * config.seq_len
    assert 0 <= 10 * tokens - config.steps * per_step < per_step
    assert config.checkpoint.at_words == ""
    with pytest.raises(UserError, match="--config: corpus: no corpus at 'missing'"):
        load(ROOT / "configs" / "babylm.py", "corpus=missing")


@pytest.mark.parametrize(("track", "count"), [("strict-small", 19), ("strict", 28)])
def test_babylm_saves_the_milestones_of_the_challenge(track, count):
    config = load(ROOT / "configs" / "babylm.py", f"track={track}")
    check_config(config)
    names = config.checkpoint.at_words.split(",")
    assert len(names) == count
    assert names[:11] == [f"{m}M" for m in (*range(1, 10), 10, 20)]
    assert names[-1] == {"strict-small": "100M", "strict": "1000M"}[track]


def test_the_config_of_the_paper():
    config = load(ROOT / "configs" / "dual_470m.py")
    params = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    total = sum(p.size for p in jax.tree.leaves(params))
    assert 465e6 < total < 475e6
    assert 360e6 < total - 2 * 51_200 * 1024 < 365e6  # without embeddings and output matrix
    assert config.steps * config.batch_size * config.seq_len == 2**35
    assert params["blocks"]["attention"]["query"]["kernel"].shape == (24, 1024, 1024)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ("muon", 7e-3, 0.1)
    assert (optimizer.momentum, optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (
        0.95,
        0.9,
        0.95,
        1e-8,
    )
    assert (optimizer.schedule.name, optimizer.schedule.warmup_steps, optimizer.schedule.decay_fraction) == (
        "wsd",
        0,
        0.25,
    )
    assert (config.loss.z_loss, optimizer.max_grad_norm, config.valid.every) == (1e-4, 0.0, 128)


def test_the_low_resource_recipe_repeats_the_small_corpus_only():
    config = load(ROOT / "configs" / "dual_low_resource.py")
    plan = MixturePlan(config)
    tokens = [sequences * config.seq_len for sequences in plan.source_sequences(config.steps)]
    unique = [source.unique(budget) for source, budget in zip(plan.sources, tokens, strict=True)]
    assert [source.name for source in plan.sources] == ["large", "small"]
    assert [source.repetitions for source in plan.sources] == [1, 16]
    assert 1.999e9 < unique[0] < 2e9 and 99.9e6 < unique[1] < 100e6
    rows_J = plan.member_rows(config.steps)
    assert rows_J[0] / rows_J[:2].sum() == pytest.approx(63 / 64, abs=1e-5)
    assert rows_J[2] / rows_J[2:].sum() == pytest.approx(1 / 2, abs=1e-5)


def test_alpha_is_the_share_of_causal_rows():
    config = default_config()
    config.mixture.prefix = 0.3
    set_alpha(config, 0.25)
    assert dict(config.mixture) == dict.fromkeys(config.mixture, 0.0) | {
        "causal": 0.25,
        "masked_diffusion": 0.75,
    }


def test_arguments_are_parsed_by_type():
    assert parse_arg("a=1,b=0.5", a=int, b=float) == {"a": 1, "b": 0.5}
    assert parse_arg("", a=int) == {}
    with pytest.raises(UserError, match="c"):
        parse_arg("c=1", a=int)
    with pytest.raises(UserError, match="'x'"):
        parse_arg("a=x", a=int)


def test_only_keys_that_change_learning_prevent_a_run_from_resuming():
    a, b = default_config(), default_config()
    b.mesh.fsdp, b.log.wandb, b.checkpoint.max_to_keep, b.gradient_accumulation_steps, b.data.path = (
        4,
        "project",
        9,
        2,
        "elsewhere",
    )
    b.model.remat, b.valid.every = "full", 7
    assert difference(a, b) == []
    b.optimizer.beta2, b.model.num_layers, b.log.every = 0.99, 5, 3
    changes = ["log.every: 10 -> 3", "model.num_layers: 4 -> 5", "optimizer.beta2: 0.95 -> 0.99"]
    assert difference(a, b) == changes


def test_keys_that_a_run_sets_may_be_unset_when_it_resumes():
    run, config = default_config(), default_config()
    run.model.vocab_size, run.data.identity, run.start.step = 512, "abc", 8
    assert difference(run, config) == []
    config.model.vocab_size, config.data.identity, config.start.step = 384, "abd", 4
    assert [change.split(":")[0] for change in difference(run, config)] == [
        "data.identity",
        "model.vocab_size",
        "start.step",
    ]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.num_layers", 0, "at least 1"),
        ("optimizer.learning_rate", -1.0, "positive"),
        ("optimizer.beta2", 1.0, r"\[0, 1\)"),
        ("optimizer.schedule.decay_fraction", 1.5, r"\[0, 1\]"),
        ("loss.z_loss", -1e-4, "at least 0"),
        ("model.dtype", "float8", "one of float32, bfloat16"),
        ("model.remat", "some", "one of"),
        ("optimizer.name", "sgd", "one of"),
        ("checkpoint.keep_period", -1, "at least 0"),
        ("optimizer.schedule.constant_fraction", -0.5, "at least 0"),
        ("mesh.fsdp", 0, "at least 1, or -1"),
        ("start.step", -2, "at least -1"),
        ("steps", 10**7 + 1, "from 1 to 10000000"),
    ],
)
def test_invalid_values_are_rejected_by_name(key, value, message):
    config = default_config()
    *folders, name = key.split(".")
    place = config
    for folder in folders:
        place = place[folder]
    place[name] = value
    with pytest.raises(UserError, match=rf"config\.{key}=.*{message}"):
        check_config(config)


def test_unique_tokens_of_a_source_may_exceed_two_billion():
    """Also as an integer, in a config that does not use `add_source`."""
    config = default_config()
    config.sources = {"web": {"corpus": "web", "share": 1.0, "unique_tokens": 5_000_000_000}}
    check_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, r"num_kv_heads=3 must divide config.model.num_heads=4"),
        ({"num_kv_heads": 8}, r"num_kv_heads=8 must divide config.model.num_heads=4"),
        ({"head_dim": 7}, r"head_dim=7 must be even"),
        ({"num_heads": 3}, r"num_heads=3 must divide config.model.d_model=256 .* or set"),
        ({"qk_norm": "layer"}, "one of none, head, projection"),
        ({"norm_placement": "both"}, "one of pre, post"),
        ({"rope_scaling.name": "yarn"}, "one of none, llama3"),
        ({"rope_scaling.factor": 0.5}, "at least 1"),
        ({"rope_scaling.name": "llama3", "rope_scaling.low_freq_factor": 4.0}, "than high_freq_factor=4.0"),
    ],
    ids=str,
)  # fmt: skip
def test_shapes_and_scalings_that_do_not_fit_are_rejected(changes, message):
    config = default_config()
    config.model.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        check_config(config)


def test_heads_need_not_divide_the_model():
    config = default_config()
    config.model.num_heads, config.model.num_kv_heads, config.model.head_dim = 6, 2, 48
    check_config(config)


def test_missing_extra_and_mistyped_keys_are_named():
    config = default_config()
    config.model.depth = 3
    with pytest.raises(UserError, match=r"config\.model\.depth"):
        check_config(config)
    config = default_config()
    del config.loss.z_loss
    with pytest.raises(UserError, match=r"config\.loss\.z_loss is missing"):
        check_config(config)
    config = default_config()
    with config.ignore_type():
        config.steps = "ten"
    with pytest.raises(UserError, match=r"config\.steps='ten'.*int"):
        check_config(config)


def test_a_run_of_version_0_1_is_rejected():
    with pytest.raises(UserError, match="made by dualsm 0.1"):
        load_config('{"batch_rows": 64}')


def test_every_default_is_valid_and_every_key_is_documented():
    check_config(default_config())
    assert len({key.name for key in KEYS}) == len(KEYS)
    assert all(key.doc.endswith(".") for key in KEYS)
