"""Checksums detect checkpoints that have changed on disk."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dualsm.config import default_config
from dualsm.process.errors import UserError
from dualsm.rundir.checkpoint import Checkpoints, abstract
from dualsm.rundir.checkpoint_reader import restore_parts
from dualsm.rundir.checksums import changed, checksums


def tree() -> dict:
    key = jax.random.key(0)
    return {
        "params": {"kernel": jax.random.normal(key, (16, 24)), "bias": jnp.zeros(8)},
        "step": jnp.int32(7),
        "half": jax.random.normal(key, (4, 6), jnp.bfloat16),
    }


@pytest.mark.parametrize("shape", [(64,), (4, 16), (16, 4), (2, 4, 8)])
def test_checksum_depends_on_every_bit_and_every_position(shape):
    words = np.arange(64, dtype=np.uint32).reshape(shape) * 2654435761
    seen = {checksums({"a": words})["a"]}
    for place in range(64):
        for bit in range(32):
            flipped = words.copy()
            flipped.flat[place] ^= np.uint32(1 << bit)
            seen.add(checksums({"a": flipped})["a"])
    assert len(seen) == 1 + 64 * 32
    assert checksums({"a": words})["a"] != checksums({"a": words[::-1]})["a"]


@pytest.mark.parametrize("shape", [(), (7,), (24, 3), (5, 6), (3, 4, 5)])
def test_checksum_equals_its_definition(shape):
    """A change of the definition would make existing checkpoints appear damaged."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    array = np.random.default_rng(0).standard_normal(shape, np.float32)
    words = np.asarray(array).view(np.uint32).ravel().tolist()
    expected = sum(mix(word ^ mix(place + 1)) for place, word in enumerate(words)) % 2**32
    assert checksums({"a": array}) == {"a": expected}


def test_checksum_does_not_depend_on_the_sharding():
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    whole = tree()["params"]["kernel"]
    for spec in (("a", "b"), ("b", None), (None, "a"), (("a", "b"), None)):
        laid_out = jax.device_put(whole, NamedSharding(mesh, PartitionSpec(*spec)))
        assert checksums([laid_out]) == checksums([whole])


def test_changed_arrays_are_named():
    saved = checksums(tree())
    later = tree()
    later["params"]["bias"] = later["params"]["bias"].at[3].set(-0.0)  # one bit
    assert set(saved) == {"params/kernel", "params/bias", "step", "half"}
    assert changed(tree(), saved) == []
    assert changed(later, saved) == ["params/bias"]


@pytest.fixture
def saved(tmp_path):
    """Returns a run directory with a checkpoint of step 1, the config, and the abstract state."""
    config = default_config().checkpoint
    state = tree()
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.save(1, state)
    checkpoints.finish()
    checkpoints.close()
    place = jax.tree.map(lambda x: x.sharding, state)
    return tmp_path, config, abstract(state, place)


def test_checkpoints_with_flipped_bits_are_rejected(saved, capsys):
    """Flips random bits of all files: the checkpoint is rejected or its arrays are unchanged."""
    workdir, config, shapes = saved
    expected = tree()
    files = sorted(p for p in (workdir / "checkpoints" / "1").rglob("*") if p.is_file() and p.stat().st_size)
    rng, refused = random.Random(0), 0
    for _ in range(40):
        path = rng.choice(files)
        content = bytearray(whole := path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        checkpoints = Checkpoints(workdir, config)
        try:
            restored = checkpoints.restore(shapes)
            jax.tree.map(np.testing.assert_array_equal, restored, expected)
        except UserError as error:
            assert "can be read" in str(error)
            refused += 1
        finally:
            checkpoints.close()
            path.write_bytes(whole)
    assert refused > 5


def test_weights_with_wrong_checksums_are_rejected(saved, monkeypatch):
    """Even if the file formats do not detect the change."""
    workdir, config, shapes = saved
    wrong = checksums(tree()) | {"params/kernel": 1}
    checkpoints = Checkpoints(workdir, config)
    with monkeypatch.context() as patch:
        patch.setattr("dualsm.rundir.checksums.start_checksums", lambda state: lambda: wrong)
        checkpoints.save(2, tree())
    checkpoints.finish()
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(shapes), tree())  # step 1
    assert checkpoints.newest() == 1
    checkpoints.close()
    with pytest.raises(UserError, match=r"checkpoints/2 is damaged .*params/kernel"):
        restore_parts(workdir, {"params": shapes["params"]})
    assert restore_parts(workdir, {"params": shapes["params"]}, step=1)[0] == 1


def test_checkpoints_with_missing_or_truncated_files_are_rejected(saved, capsys):
    """Removes or truncates each file: the checkpoint is rejected or its arrays are unchanged."""
    workdir, config, shapes = saved
    refused = set()
    for path in [p for p in (workdir / "checkpoints" / "1").rglob("*") if p.is_file() and p.stat().st_size]:
        whole = path.read_bytes()
        for content in (None, whole[: len(whole) // 2], whole.replace(b'"item_h', b'"tem_h')):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            checkpoints = Checkpoints(workdir, config)
            try:
                restored = checkpoints.restore(shapes)
                if restored is not None:  # None: without its commit marker it is not a checkpoint
                    jax.tree.map(np.testing.assert_array_equal, restored, tree())
            except UserError as error:
                assert "can be read" in str(error)
                refused.add(path.name)
            finally:
                checkpoints.close()
                path.write_bytes(whole)
    assert {"_METADATA", "_CHECKPOINT_METADATA"} <= refused
    reasons = [line.partition("damaged checkpoint ")[2] for line in capsys.readouterr().err.splitlines()]
    assert max(map(len, reasons)) < 300 + 4 * len(str(workdir))  # without settings


def damage(checkpoint) -> None:
    """Truncates the arrays of a checkpoint to half of their size."""
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def steps_in(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.fixture
def skipped(saved):
    """Opened checkpoints of steps 1 (intact) and 8 (damaged, skipped)."""
    workdir, config, shapes = saved
    checkpoints = Checkpoints(workdir, config)
    checkpoints.save(8, tree())
    checkpoints.close()
    damage(workdir / "checkpoints" / "8")
    checkpoints = Checkpoints(workdir, config)
    assert checkpoints.restore(shapes) is not None
    yield workdir, shapes, checkpoints
    checkpoints.close()


@pytest.mark.parametrize("step", [6, 8, 12])
def test_damaged_checkpoints_do_not_prevent_saving(skipped, step):
    """Earlier and later steps can be saved, and the damaged one does not count towards `max_to_keep`."""
    workdir, shapes, checkpoints = skipped
    assert checkpoints.newest() == 1
    checkpoints.save(step, tree())
    checkpoints.finish()
    assert checkpoints.newest() == step
    assert steps_in(workdir) == [1, step]
    assert restore_parts(workdir, {"params": shapes["params"]})[0] == step


def test_failed_save_keeps_the_intact_checkpoint(skipped, monkeypatch, capsys):
    workdir, shapes, checkpoints = skipped
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "save", lambda *args, **kwargs: False)
        checkpoints.save(6, tree())
    assert "the checkpoint of step 6 could not be saved" in capsys.readouterr().err
    assert steps_in(workdir) == [1]
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(shapes), tree())


def test_save_that_orbax_skips_is_a_failure(saved):
    workdir, config, _ = saved
    config.max_failed_saves = 0
    checkpoints = Checkpoints(workdir, config)
    with pytest.raises(UserError, match="step 0 could not be saved .a checkpoint of step 1 already exists"):
        checkpoints.save(0, tree())
    checkpoints.close()
