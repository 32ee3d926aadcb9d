"""A forked run continues as if it had trained up to the step of its checkpoint itself."""

import shutil

import jax
import numpy as np
import pytest

from dualsm.data.build import Recipe, build
from dualsm.process.errors import UserError
from dualsm.rundir.checkpoint_reader import restore_params
from dualsm.rundir.metrics import read_metrics
from dualsm.rundir.trained_run import open_run
from dualsm.rundir.workdir import read_config
from dualsm.training.loop import train


@pytest.fixture(scope="module")
def original(corpus_path, tmp_path_factory):
    """A finished run with checkpoints at steps 4, 8 and 12, its config and folder."""
    from tests.micro import micro_config

    config = micro_config(corpus_path)
    config.checkpoint.max_to_keep, config.valid.every, config.mesh.data = 3, 4, -1
    folder = tmp_path_factory.mktemp("original") / "run"
    assert train(config, folder)
    return config, folder


def final_params(folder, like) -> list[np.ndarray]:
    run = open_run(folder)
    assert run.step == like.steps
    return [np.asarray(p) for p in jax.tree.leaves(run.params)]


def test_fork_with_the_same_config_is_bit_identical(original, tmp_path):
    config, folder = original
    fork = config.copy_and_resolve_references()
    fork.start.run, fork.start.step = str(folder), 4
    assert train(fork, tmp_path / "fork")
    for ours, theirs in zip(
        final_params(tmp_path / "fork", config), final_params(folder, config), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    first, *others = read_metrics(tmp_path / "fork")
    assert [first["step"], *(record["step"] for record in others)] == [4, 6, 8, 10, 12]
    scores = {name: value for name, value in first.items() if name.startswith("valid/")}
    (known,) = (record for record in read_metrics(folder) if record["step"] == 4)
    assert scores and scores == {name: known[name] for name in scores}
    assert not any(name.startswith("train/") for name in first), first


def test_fork_of_a_run_without_an_average_starts_it_from_the_weights(original, tmp_path):
    config, folder = original
    fork = config.copy_and_resolve_references()
    fork.start.run, fork.start.step = str(folder), 8
    fork.ema.decay, fork.ema.every = 0.5, 100  # no update after the fork
    assert train(fork, tmp_path / "fork")
    average, start = open_run(tmp_path / "fork", parameters="ema").params, open_run(folder, 8).params
    jax.tree.map(np.testing.assert_array_equal, average, start)


def test_fork_can_change_schedule_and_mixture(original, tmp_path):
    config, folder = original
    fork = config.copy_and_resolve_references()
    fork.start.run, fork.start.step = str(folder), 8
    fork.optimizer.schedule.decay_fraction = 1 / 3
    fork.mixture_schedule.name, fork.mixture_schedule.path = "steps", "0.5 masked_diffusion=1"
    assert train(fork, tmp_path / "fork")
    records = read_metrics(tmp_path / "fork")
    assert "train/causal/loss" not in records[-1]
    assert records[-1]["train/learning_rate"] < records[1]["train/learning_rate"]  # the first has no step


def test_stopped_fork_resumes_from_its_own_checkpoint(original, tmp_path):
    config, folder = original
    fork = config.copy_and_resolve_references()
    fork.start.run, fork.start.step = str(folder), 4
    assert not train(fork, tmp_path / "fork", stop=lambda step: step > 4)
    assert train(fork, tmp_path / "fork")
    for ours, theirs in zip(
        final_params(tmp_path / "fork", config), final_params(folder, config), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start.step": 5}, "has no checkpoint of step 5"),
        ({"start.run": "/nowhere", "start.step": 4}, "no run at /nowhere"),
        ({"start.step": 12}, "is not before the end of this run .config.steps=12"),
        ({"start.step": -1}, "is not before the end"),
        ({"start.run": "", "start.step": 4}, "config.start.step=4 needs config.start.run"),
        ({"start.step": 4, "model.d_ff": 96}, "of another model"),
        ({"start.step": 4, "optimizer.name": "adamw"}, "another model or optimizer: .* muon -> adamw$"),
        ({"start.step": 4, "optimizer.weight_decay_schedule.name": "linear"}, "another model .* -> linear$"),
    ],
)
def test_invalid_forks_raise_user_errors(original, tmp_path, changes, message):
    config, folder = original
    fork = config.copy_and_resolve_references()
    fork.start.run = str(folder)
    fork.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        train(fork, tmp_path / "fork")
    assert (tmp_path / "fork").exists() == ("another model" in message)


def test_newest_checkpoint_is_chosen_at_the_first_start(original, tmp_path, monkeypatch):
    """A fork killed before its first save starts again from the same checkpoint, not from a newer one."""
    config, folder = original
    moving = tmp_path / "moving"
    shutil.copytree(folder, moving)
    shutil.rmtree(moving / "checkpoints" / "12")
    shutil.move(moving / "checkpoints" / "8", tmp_path / "8")
    fork = config.copy_and_resolve_references()
    fork.start.run, fork.valid.objectives = str(moving), ""  # fewer programs to compile
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dualsm.training.loop.read_batches", _killed)
        train(fork, tmp_path / "fork")
    assert read_config(tmp_path / "fork").start.step == 4
    shutil.move(tmp_path / "8", moving / "checkpoints" / "8")
    assert train(fork, tmp_path / "fork")  # the same command
    assert [record["step"] for record in read_metrics(tmp_path / "fork")] == [6, 8, 10, 12]

    shutil.rmtree(moving)  # a fork with its own checkpoints no longer needs the original run
    assert train(fork, tmp_path / "fork")
    fork.start.step = 8
    with pytest.raises(UserError, match="another config .start.step: 4 -> 8"):
        train(fork, tmp_path / "fork")


def _killed(*_):
    raise KeyboardInterrupt


def test_fork_with_another_tokenizer_raises_a_user_error(original, jsonl, tmp_path):
    """Also if both vocabularies have the same size."""
    config, folder = original
    lines = jsonl.read_text().splitlines(keepends=True)
    (tmp_path / "half.jsonl").write_text("".join(lines[::2]))
    recipe = Recipe(input=str(tmp_path / "half.jsonl"), vocab_size=512, valid_fraction=0.05)
    build(recipe, str(tmp_path / "corpus"), workers=1, quiet=True)
    fork = config.copy_and_resolve_references()
    fork.start.run, fork.start.step = str(folder), 4
    fork.data.path = str(tmp_path / "corpus")
    with pytest.raises(UserError, match=f"another tokenizer .*--tokenizer={folder}/tokenizer.model"):
        train(fork, tmp_path / "fork")
    assert not (tmp_path / "fork").exists()


def test_original_run_is_unchanged(original):
    config, folder = original
    step, _ = restore_params(folder, _abstract(config, folder))
    assert step == config.steps


def _abstract(config, folder):
    from dualsm.rundir.trained_run import open_run

    return jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), open_run(folder).params
    )
