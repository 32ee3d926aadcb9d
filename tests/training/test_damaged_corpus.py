"""A run on a damaged corpus ends before its first checkpoint, with the name of the shard."""

import json
import shutil

import jax
import pytest

from dualsm.process.errors import UserError
from dualsm.training.loop import train


@pytest.fixture
def copy(micro, corpus_path, tmp_path, monkeypatch):
    """Returns a copy of the corpus; the config uses the copy, one device and no validation."""
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    micro.optimizer.name, micro.valid.objectives = "adamw", ""
    micro.mixture.update({"causal": 1.0, "prefix": 0.0, "masked_diffusion": 0.0})
    micro.data.path = str(tmp_path / "corpus")
    return shutil.copytree(corpus_path, tmp_path / "corpus")


def shards_of(folder):
    shards = json.loads((folder / "manifest.json").read_text())["splits"]["train"]["shards"]
    return [folder / shard["file"] for shard in shards]


@pytest.mark.parametrize("verify", [True, False])
def test_no_flipped_byte_is_trained_on(micro, copy, tmp_path, verify):
    """Without `data.verify` the checksum of the records detects the bytes when they are read."""
    micro.data.verify = verify
    for shard in shards_of(copy):
        content = bytearray(shard.read_bytes())
        used = [place for place, byte in enumerate(content) if byte]  # zeros are padding
        for part in range(8):  # the run reads only some of the records
            content[used[len(used) * part // 9 + 100]] ^= 1
        shard.write_bytes(content)
    with pytest.raises(UserError, match=r"corpus (shard|file) .*train-\d+-of-\d+.array_record is damaged"):
        train(micro, tmp_path / "run")
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_hash_that_changed_ends_the_run_before_its_first_checkpoint(micro, copy, tmp_path):
    """The shard is intact but its hash in the manifest differs, as if it had been replaced."""
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    name = manifest["splits"]["train"]["shards"][0]["file"]
    with pytest.raises(UserError, match=f"{name} is damaged .its hash"):
        train(micro, tmp_path / "run")
    assert not any((tmp_path / "run" / "checkpoints").iterdir())
