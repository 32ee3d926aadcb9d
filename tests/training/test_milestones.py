"""Milestones: checkpoints after numbers of words, and their export."""

import json
import shutil
from types import SimpleNamespace

import pytest

from dualsm.config import load_config
from dualsm.exchange import export_milestones
from dualsm.objectives.plan import MixturePlan
from dualsm.process.errors import UserError
from dualsm.rundir.checkpoint_reader import checkpoint_steps
from dualsm.rundir.milestones import find_milestones, read_milestones
from dualsm.training.loop import train
from tests.conftest import run_command
from tests.micro import micro_config

pytestmark = pytest.mark.slow

# 8 rows of 32 tokens per step, and 3 words per 4 tokens: 192 words per step, or 96 if every row has a pair.
SPLIT = {"words": 300, "tokens": 400}


def corpus_with(split):
    """Returns what `find_milestones` reads of a corpus: a manifest with exact word counts."""
    return SimpleNamespace(folder="corpus", manifest={"splits": {"train": split}})


def milestones(config, at_words, split=SPLIT):
    config.checkpoint.at_words = at_words
    return find_milestones(config, MixturePlan(config), [corpus_with(split)])


@pytest.mark.parametrize(
    ("words", "step"), [("1", 1), ("192", 1), ("193", 2), ("384", 2), ("1K", 6), ("2304", 12), ("2320", 12)]
)
def test_a_milestone_is_the_first_step_with_its_words(micro, words, step):
    assert milestones(micro, words) == {step: words}


def test_words_of_pairs_count_once(micro):
    micro.mixture.causal = micro.mixture.prefix = micro.mixture.masked_diffusion = 0.0
    micro.mixture.mir = 1.0
    assert milestones(micro, "96,97,1152") == {1: "96", 2: "97", 12: "1152"}


@pytest.mark.parametrize(
    ("at_words", "split", "message"),
    [
        ("1K,3K", SPLIT, "at_words=3K: the run has only 2,304 words; raise config.steps"),
        ("100,150", SPLIT, "100 and 150 are at the same step, 1"),
        ("1K", {"tokens": 400}, "did not count words; prepare it again"),
    ],
)
def test_impossible_milestones_are_rejected(micro, at_words, split, message):
    with pytest.raises(UserError, match=message):
        milestones(micro, at_words, split)


@pytest.fixture(scope="module")
def run(corpus_path, tmp_path_factory):
    """Trains a run with milestones at steps 1, 3 and 12 that keeps only the newest checkpoint beside them."""
    config, workdir = micro_config(corpus_path), tmp_path_factory.mktemp("milestones") / "run"
    split = json.loads((corpus_path / "manifest.json").read_text())["splits"]["train"]
    per_step = config.batch_size * config.seq_len * split["words"] / split["tokens"]
    config.checkpoint.at_words = f"1,{int(2.5 * per_step)},{int(11.5 * per_step)}"
    config.checkpoint.max_to_keep, config.valid.objectives, config.mesh.data = 1, "", -1
    train(config, workdir)
    return workdir


def test_checkpoints_of_milestones_are_kept(run):
    assert list(read_milestones(run)) == [1, 3, 12]
    assert checkpoint_steps(run) == [1, 3, 12]


def test_each_milestone_is_exported_with_its_weights(run, tmp_path):
    from safetensors.numpy import load_file

    command = ["dualsm.convert", "export", "--format=huggingface", f"--workdir={run}"]
    process = run_command(*command, "--milestones", f"--output={tmp_path / 'all'}")
    assert process.returncode == 0, process.stderr
    names = [f"chck_{name}" for name in read_milestones(run).values()]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(names)
    process = run_command(*command, "--checkpoint=3", f"--output={tmp_path / 'third'}")
    assert process.returncode == 0, process.stderr
    third, alone = (
        load_file(p / "model.safetensors") for p in (tmp_path / "all" / names[1], tmp_path / "third")
    )
    assert third.keys() == alone.keys()
    assert all((third[key] == alone[key]).all() for key in alone)
    first = load_file(tmp_path / "all" / names[0] / "model.safetensors")
    assert any((first[key] != third[key]).any() for key in first)


def test_milestones_are_kept_by_a_run_that_resumes_without_them(run, tmp_path):
    """`config.checkpoint` may change when a run resumes."""
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    config = load_config((workdir / "config.json").read_text())
    config.checkpoint.at_words, config.checkpoint.every = "", 5
    train(config, workdir)
    assert checkpoint_steps(workdir) == [1, 3, 12]
    assert list(read_milestones(workdir)) == [1, 3, 12]


def test_runs_without_milestones_are_not_exported(run, tmp_path):
    with pytest.raises(UserError, match="has no milestones"):
        export_milestones.export(tmp_path, tmp_path / "out", "last", lambda *_: "")
    (tmp_path / "milestones.json").write_text('{"5": "1K"}')
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    with pytest.raises(UserError, match=r"no checkpoint of a milestone; the first is 1K \(step 5\)"):
        export_milestones.export(tmp_path, tmp_path / "out", "last", lambda *_: "")
    assert not (tmp_path / "out").exists()
