"""Checkpoints whose bits have changed on disk are noticed."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dualsm.config import default_config
from dualsm.process.errors import UserError
from dualsm.rundir.checkpoint import Checkpoints, abstract, restore_parts
from dualsm.rundir.checksums import changed, checksums


def tree() -> dict:
    key = jax.random.key(0)
    return {
        "params": {"kernel": jax.random.normal(key, (16, 24)), "bias": jnp.zeros(8)},
        "step": jnp.int32(7),
        "half": jax.random.normal(key, (4, 6), jnp.bfloat16),
    }


@pytest.mark.parametrize("shape", [(64,), (4, 16), (16, 4), (2, 4, 8)])
def test_each_bit_and_each_place_counts(shape):
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
def test_a_checksum_is_the_sum_of_hashes_of_words_and_places(shape):
    """The definition, word by word; with another one, checkpoints of before would seem damaged."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    array = np.random.default_rng(0).standard_normal(shape, np.float32)
    words = np.asarray(array).view(np.uint32).ravel().tolist()
    expected = sum(mix(word ^ mix(place + 1)) for place, word in enumerate(words)) % 2**32
    assert checksums({"a": array}) == {"a": expected}


def test_the_layout_on_devices_does_not_matter():
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    whole = tree()["params"]["kernel"]
    for spec in (("a", "b"), ("b", None), (None, "a"), (("a", "b"), None)):
        laid_out = jax.device_put(whole, NamedSharding(mesh, PartitionSpec(*spec)))
        assert checksums([laid_out]) == checksums([whole])


def test_what_changed_is_named():
    saved = checksums(tree())
    later = tree()
    later["params"]["bias"] = later["params"]["bias"].at[3].set(-0.0)  # one bit
    assert set(saved) == {"params/kernel", "params/bias", "step", "half"}
    assert changed(tree(), saved) == []
    assert changed(later, saved) == ["params/bias"]


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of step 1, and what it was restored into."""
    config = default_config().checkpoint
    state = tree()
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.save(1, state)
    checkpoints.finish()
    checkpoints.close()
    place = jax.tree.map(lambda x: x.sharding, state)
    return tmp_path, config, abstract(state, place)


def test_flipped_bits_are_never_trained_on(saved, capsys):
    """Bits flipped at random over all files: the checkpoint is refused, or they made no difference."""
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


def test_weights_that_are_not_the_saved_ones_are_refused(saved, monkeypatch):
    """Even where the file formats notice nothing."""
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


def test_a_missing_or_shortened_file_is_damage(saved, capsys):
    """Each file of a checkpoint, gone or cut in half: refused, or it made no difference."""
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
                if restored is not None:  # without its mark of completion it is no checkpoint
                    jax.tree.map(np.testing.assert_array_equal, restored, tree())
            except UserError as error:
                assert "can be read" in str(error)
                refused.add(path.name)
            finally:
                checkpoints.close()
                path.write_bytes(whole)
    assert {"_METADATA", "_CHECKPOINT_METADATA"} <= refused
    reasons = [line.partition("damaged checkpoint ")[2] for line in capsys.readouterr().err.splitlines()]
    assert max(map(len, reasons)) < 300 + 4 * len(str(workdir))  # no settings of the readers


def damage(checkpoint) -> None:
    """Cuts the arrays of a checkpoint in half."""
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
def test_a_damaged_checkpoint_keeps_no_step_from_being_saved(skipped, step):
    """Neither one before its own, nor does it count among those to keep."""
    workdir, shapes, checkpoints = skipped
    assert checkpoints.newest() == 1
    checkpoints.save(step, tree())
    checkpoints.finish()
    assert checkpoints.newest() == step
    assert steps_in(workdir) == [1, step]
    assert restore_parts(workdir, {"params": shapes["params"]})[0] == step


def test_a_save_that_fails_leaves_the_whole_checkpoint(skipped, monkeypatch, capsys):
    workdir, shapes, checkpoints = skipped
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "save", lambda *args, **kwargs: False)
        checkpoints.save(6, tree())
    assert "the checkpoint of step 6 could not be saved" in capsys.readouterr().err
    assert steps_in(workdir) == [1]
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(shapes), tree())


def test_a_save_that_orbax_does_not_make_has_failed(saved):
    workdir, config, _ = saved
    config.max_failed_saves = 0
    checkpoints = Checkpoints(workdir, config)
    with pytest.raises(UserError, match="step 0 could not be saved .a checkpoint of step 1 already exists"):
        checkpoints.save(0, tree())
    checkpoints.close()
