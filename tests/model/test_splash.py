"""The TPU kernel, run without a TPU, against plain attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm import sharding
from dualsm.errors import UserError
from dualsm.model import attention
from dualsm.model.attention import attend, range_mask
from dualsm.model.splash import attend_splash, next_seen, seen_blocks
from dualsm.model.transformer import bind
from dualsm.objectives.loss import example_loss
from dualsm.objectives.mixture import OBJECTIVES
from tests.objectives.conftest import batch, far_from_initial, packed, rewritten, tiny_model

L, H, K = 384, 2, 8  # three blocks of 128
LAYOUTS = ([900], [128, 256, 9], [40, 200, 60, 200], [150, 100])  # the last is filled up

interpreted = functools.partial(attend_splash, interpret=True)


@pytest.fixture(scope="module")
def ranges() -> tuple[np.ndarray, np.ndarray]:
    """A row of every objective, documents of all sorts."""
    examples = [
        rewritten(name, batch([packed(LAYOUTS[i % len(LAYOUTS)], L)]), seed=i)
        for i, name in enumerate(OBJECTIVES)
    ]
    return tuple(np.concatenate([getattr(e, key) for e in examples]) for key in ("key_start_L", "key_end_L"))


@pytest.fixture
def on_a_tpu(monkeypatch):
    """`attend` takes this machine for a TPU."""
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    monkeypatch.setattr(attention, "attend_splash", interpreted)


def mesh(**sizes: int) -> jax.sharding.Mesh:
    """Over four of the fake devices."""
    return sharding.make_mesh({"replica": 1, "fsdp": 1} | sizes, jax.devices()[:4])


def results(backend, q, k, v, ranges) -> list[np.ndarray]:
    """The attended values, and the gradients of a weighting of them."""

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *qkv: backend(*qkv, *ranges), q, k, v)
        return out, *pull(jnp.cos(jnp.arange(out.size)).reshape(out.shape))

    return [np.asarray(x) for x in run(q, k, v)]


def test_a_batch_of_all_objectives(ranges):
    q, k, v = jax.random.normal(jax.random.key(0), (3, len(OBJECTIVES), L, H, K))
    expected = results(functools.partial(attend, backend="xla"), q, k, v, ranges)
    for ours, theirs in zip(results(interpreted, q, k, v, ranges), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_blocks_that_are_skipped_hold_nothing(ranges):
    start, end = ranges
    seen = np.asarray(seen_blocks(*ranges, 128))
    needed = np.asarray(range_mask(start, end, L)).reshape(-1, 3, 128, 3, 128).any((2, 4))
    assert not (needed & ~seen).any()
    assert seen.mean() < 0.8  # the half above the diagonal of causal rows, and other documents


@pytest.mark.parametrize("axis", [1, 2])
def test_what_is_fetched_next(axis):
    seen = np.random.default_rng(0).random((4, 5, 5)) < 0.4
    seen[0] = False
    fetched = np.moveaxis(np.asarray(next_seen(jnp.asarray(seen), axis)), axis, -1).reshape(-1, 5)
    for row, found in zip(np.moveaxis(seen, axis, -1).reshape(-1, 5), fetched, strict=True):
        places = np.flatnonzero(row)
        for j in range(5):
            later = places[places >= j]
            assert found[j] == (later[0] if len(later) else places[-1] if len(places) else 0)


def test_a_model_trains_the_same(on_a_tpu):
    """Under the scan over layers, remat, and a mesh that divides rows and heads."""
    config = tiny_model()
    config.remat = "full"
    params = far_from_initial(config, 0.1)
    rows = batch([packed([100, 90, 300], 256)] * 4)
    examples = jax.tree.map(
        lambda *parts: np.concatenate(parts),
        *(rewritten(name, jax.tree.map(lambda x: x[:2], rows)) for name in ("prefix", "masked_diffusion")),
    )

    def gradients(backend: str):
        config.attention = backend

        def loss(params):
            return example_loss(bind(config, params), examples, chunk=64)[0]

        return jax.jit(jax.value_and_grad(loss))(params)

    expected = gradients("xla")
    with jax.set_mesh(mesh(data=2, tensor=2)):
        found = gradients("splash")
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_auto_takes_it_where_it_can(on_a_tpu, monkeypatch):
    taken = []
    monkeypatch.setattr(attention, "attend_splash", lambda q, *_: taken.append(q.shape) or q)
    for length in (128, 100):
        start = jnp.zeros((1, length), jnp.int32)
        attend(*jnp.ones((3, 1, length, H, K)), start, start + 1)
    assert taken == [(1, 128, H, K)]


def test_it_is_refused_where_it_cannot(monkeypatch):
    def asked(length, heads=H):
        start = jnp.zeros((4, length), jnp.int32)
        jax.eval_shape(lambda q: attend(q, q, q, start, start + 1, "splash"), jnp.ones((4, length, heads, K)))

    with pytest.raises(UserError, match="needs TPUs, not cpu"):
        asked(128)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    with pytest.raises(UserError, match="multiple of 128 positions, not 100"):
        asked(100)
    with (
        jax.set_mesh(mesh(data=1, tensor=4)),
        pytest.raises(UserError, match="heads that 4 devices can share, not 2"),
    ):
        asked(128)
