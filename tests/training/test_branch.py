"""A run that branches off another goes on as if it had come to that step itself."""

import shutil

import jax
import numpy as np
import pytest

from dualsm.data.build import Recipe, build
from dualsm.process.errors import UserError
from dualsm.rundir.checkpoint import restore_params
from dualsm.rundir.metrics import read_metrics
from dualsm.rundir.workdir import read_config
from dualsm.training.loop import train


@pytest.fixture(scope="module")
def trunk(corpus_path, tmp_path_factory):
    """A finished run with checkpoints at steps 4, 8 and 12, its config and folder."""
    from tests.micro import micro_config

    config = micro_config(corpus_path)
    config.checkpoint.max_to_keep, config.mesh.data = 3, -1
    folder = tmp_path_factory.mktemp("trunk") / "run"
    assert train(config, folder)
    return config, folder


def final_params(folder, like) -> list[np.ndarray]:
    from dualsm.rundir.trained_run import open_run

    run = open_run(folder)
    assert run.step == like.steps
    return [np.asarray(p) for p in jax.tree.leaves(run.params)]


def test_a_branch_with_the_same_config_ends_as_its_trunk_bit_for_bit(trunk, tmp_path):
    config, folder = trunk
    branch = config.copy_and_resolve_references()
    branch.start.run, branch.start.step = str(folder), 4
    assert train(branch, tmp_path / "branch")
    for ours, theirs in zip(
        final_params(tmp_path / "branch", config), final_params(folder, config), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert [record["step"] for record in read_metrics(tmp_path / "branch")] == [6, 8, 10, 12]


def test_a_branch_may_decay_and_mix_otherwise(trunk, tmp_path):
    config, folder = trunk
    branch = config.copy_and_resolve_references()
    branch.start.run, branch.start.step = str(folder), 8
    branch.optimizer.schedule.decay_fraction = 1 / 3
    branch.mixture_schedule.name, branch.mixture_schedule.path = "steps", "0.5 masked_diffusion=1"
    assert train(branch, tmp_path / "branch")
    records = read_metrics(tmp_path / "branch")
    assert "train/causal/loss" not in records[-1]
    assert records[-1]["train/learning_rate"] < records[0]["train/learning_rate"]


def test_a_branch_that_was_stopped_resumes_from_its_own_checkpoint(trunk, tmp_path):
    config, folder = trunk
    branch = config.copy_and_resolve_references()
    branch.start.run, branch.start.step = str(folder), 4
    assert not train(branch, tmp_path / "branch", stop=lambda step: True)
    assert train(branch, tmp_path / "branch")
    for ours, theirs in zip(
        final_params(tmp_path / "branch", config), final_params(folder, config), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start.step": 5}, "has no checkpoint of step 5"),
        ({"start.run": "/nowhere", "start.step": 4}, "no run at /nowhere"),
        ({"start.step": 12}, "does not lie before the end of this run, config.steps=12"),
        ({"start.step": -1}, "does not lie before the end"),
        ({"start.run": "", "start.step": 4}, "config.start.step=4 needs config.start.run"),
        ({"start.step": 4, "model.d_ff": 96}, "of another model"),
        ({"start.step": 4, "optimizer.name": "adamw"}, "of another model or optimizer"),
    ],
)
def test_impossible_branches_are_refused(trunk, tmp_path, changes, message):
    config, folder = trunk
    branch = config.copy_and_resolve_references()
    branch.start.run = str(folder)
    branch.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        train(branch, tmp_path / "branch")
    assert (tmp_path / "branch").exists() == ("of another model" in message)


def test_the_newest_checkpoint_is_settled_at_the_first_start(trunk, tmp_path, monkeypatch):
    """A branch killed before its first save goes on from the same one, whatever the trunk did since."""
    config, folder = trunk
    moving = tmp_path / "moving"
    shutil.copytree(folder, moving)
    shutil.rmtree(moving / "checkpoints" / "12")
    shutil.move(moving / "checkpoints" / "8", tmp_path / "8")
    branch = config.copy_and_resolve_references()
    branch.start.run, branch.valid.objectives = str(moving), ""  # fewer programs to compile
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dualsm.training.loop.read_batches", _killed)
        train(branch, tmp_path / "branch")
    assert read_config(tmp_path / "branch").start.step == 4
    shutil.move(tmp_path / "8", moving / "checkpoints" / "8")
    assert train(branch, tmp_path / "branch")  # the same command
    assert [record["step"] for record in read_metrics(tmp_path / "branch")] == [6, 8, 10, 12]

    shutil.rmtree(moving)  # once it has checkpoints of its own, a branch does not need its trunk
    assert train(branch, tmp_path / "branch")
    branch.start.step = 8
    with pytest.raises(UserError, match="another config .start.step: 4 -> 8"):
        train(branch, tmp_path / "branch")


def _killed(*_):
    raise KeyboardInterrupt


def test_a_branch_onto_a_corpus_of_another_tokenizer_is_refused(trunk, jsonl, tmp_path):
    """Its ids are as many, but mean other text."""
    config, folder = trunk
    lines = jsonl.read_text().splitlines(keepends=True)
    (tmp_path / "half.jsonl").write_text("".join(lines[::2]))
    recipe = Recipe(input=str(tmp_path / "half.jsonl"), vocab_size=512, valid_fraction=0.05)
    build(recipe, str(tmp_path / "corpus"), workers=1, quiet=True)
    branch = config.copy_and_resolve_references()
    branch.start.run, branch.start.step = str(folder), 4
    branch.data.path = str(tmp_path / "corpus")
    with pytest.raises(UserError, match=f"another tokenizer .*--tokenizer={folder}/tokenizer.model"):
        train(branch, tmp_path / "branch")
    assert not (tmp_path / "branch").exists()


def test_the_trunk_is_left_as_it_was(trunk):
    config, folder = trunk
    step, _ = restore_params(folder, _abstract(config, folder))
    assert step == config.steps


def _abstract(config, folder):
    from dualsm.rundir.trained_run import open_run

    return jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), open_run(folder).params
    )
