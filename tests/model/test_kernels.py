"""Attention kernels for TPUs and GPUs in interpret mode, compared with XLA attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.devices import sharding
from dualsm.model import attention, block_ranges, flash, splash
from dualsm.model.attention import attend, range_mask
from dualsm.model.transformer import bind
from dualsm.objectives.mixture import OBJECTIVES
from dualsm.process.errors import UserError
from dualsm.training.objective_loss import example_loss
from tests.objectives.conftest import batch, far_from_initial, packed, rewritten, tiny_model

pytestmark = pytest.mark.slow

L, H, K = 384, 2, 16  # three blocks of 128
LAYOUTS = ([900], [128, 256, 9], [40, 200, 60, 200], [150, 100])  # the last one is padded

INTERPRETED = {
    "splash": functools.partial(splash.attend_splash, interpret=True),
    "flash": functools.partial(flash.attend_flash, interpret=True),
}
PLATFORMS = {"splash": "tpu", "flash": "gpu"}
each_kernel = pytest.mark.parametrize("kernel", INTERPRETED)


@pytest.fixture(scope="module")
def ranges() -> tuple[np.ndarray, np.ndarray]:
    """Returns the key ranges of a row of every objective, with several layouts of documents."""
    examples = [
        rewritten(name, batch([packed(LAYOUTS[i % len(LAYOUTS)], L)]), seed=i)
        for i, name in enumerate(OBJECTIVES)
    ]
    return tuple(np.concatenate([getattr(e, key) for e in examples]) for key in ("key_start_L", "key_end_L"))


@pytest.fixture(scope="module")
def any_ranges() -> tuple[np.ndarray, np.ndarray]:
    """Returns random key ranges, which no objective needs."""
    random = np.random.default_rng(0)
    start_BxL = random.integers(0, L, (3, L)).astype(np.int32)
    return start_BxL, start_BxL + 1 + random.integers(0, L - start_BxL).astype(np.int32)


@pytest.fixture
def on_its_platform(monkeypatch):
    """Returns a function that makes `attend` select a kernel on this machine."""

    def pretend(kernel: str) -> None:
        monkeypatch.setattr(sharding, "platform", lambda: PLATFORMS[kernel])
        monkeypatch.setattr(splash, "attend_splash", INTERPRETED["splash"])
        monkeypatch.setattr(flash, "attend_flash", INTERPRETED["flash"])

    return pretend


def mesh(**sizes: int) -> jax.sharding.Mesh:
    """Returns a mesh of four simulated devices."""
    return sharding.make_mesh({"replica": 1, "fsdp": 1} | sizes, jax.devices()[:4])


def results(backend, q, k, v, ranges) -> list[np.ndarray]:
    """Returns the attended values, and the gradients of a weighted sum of them."""

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *qkv: backend(*qkv, *ranges), q, k, v)
        return out, *pull(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))

    return [np.asarray(x, np.float32) for x in run(q, k, v)]


def equal_to_plain_attention(
    kernel: str, ranges, dtype=jnp.float32, tolerance: float = 2e-5, heads=(H, H)
) -> None:
    keys, counts = jax.random.split(jax.random.key(0), 3), (heads[0], heads[1], heads[1])
    qkv = [
        jax.random.normal(key, (len(ranges[0]), L, count, K), dtype)
        for key, count in zip(keys, counts, strict=True)
    ]
    plain = functools.partial(attend, backend="xla")
    expected = results(plain, *(x.astype(jnp.float32) for x in qkv), ranges)
    for ours, theirs in zip(results(INTERPRETED[kernel], *qkv, ranges), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance)


@each_kernel
def test_kernels_equal_xla_attention_for_all_objectives(kernel, ranges):
    equal_to_plain_attention(kernel, ranges)


def test_flash_with_any_ranges(any_ranges):
    equal_to_plain_attention("flash", any_ranges)


@each_kernel
def test_grouped_queries(kernel, ranges):
    equal_to_plain_attention(kernel, [range_[::4] for range_ in ranges], heads=(4, 2))


@pytest.mark.parametrize("backend", [*INTERPRETED, "xla"])
def test_more_shards_than_key_heads(backend, on_its_platform):
    """Each of the four shards has a query head; two shards share a head of keys."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 128, heads, K)) for i, heads in enumerate((4, 2, 2)))
    ends = jnp.broadcast_to(jnp.arange(1, 129), (2, 128))
    expected = results(functools.partial(attend, backend="xla"), q, k, v, (0 * ends, ends))
    if backend != "xla":
        on_its_platform(backend)
    with jax.set_mesh(mesh(data=1, tensor=4)):
        found = results(functools.partial(attend, backend=backend), q, k, v, (0 * ends, ends))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_flash_in_half_precision(ranges):
    equal_to_plain_attention("flash", ranges, jnp.bfloat16, tolerance=0.05)


@each_kernel
def test_skipped_blocks_contain_no_visible_keys(kernel, ranges):
    needed_BxLxL = np.asarray(range_mask(*ranges, L))

    def check(seen_BxIxJ, queries: int, keys: int) -> None:
        shape = (-1, L // queries, queries, L // keys, keys)
        assert not (needed_BxLxL.reshape(shape).any((2, 4)) & ~np.asarray(seen_BxIxJ)).any()
        assert seen_BxIxJ.mean() < 0.8  # the half above the diagonal of causal rows, and other documents

    if kernel == "splash":
        check(splash.seen_blocks(*ranges, 128), 128, 128)
        return
    for blocks in (flash.FORWARD, flash.BACKWARD_QUERIES):
        visited = block_ranges.key_blocks(*ranges, blocks)
        number_J = np.arange(L // blocks.keys)
        check(
            (visited.first[..., None] <= number_J) & (number_J < visited.end[..., None]),
            blocks.queries,
            blocks.keys,
        )
    blocks = flash.BACKWARD_KEYS
    visited = block_ranges.query_blocks(*ranges, blocks)
    number_Ix1 = np.arange(L // blocks.queries)[:, None]
    check(
        (visited.first[:, None] <= number_Ix1) & (number_Ix1 < visited.end[:, None]),
        blocks.queries,
        blocks.keys,
    )


def test_flash_omits_the_mask_only_in_fully_visible_blocks(ranges, any_ranges):
    blocks = flash.FORWARD
    i_Ix1, j_J = np.arange(L // blocks.queries)[:, None], np.arange(L // blocks.keys)
    for starts, ends in (ranges, any_ranges):
        shape = (-1, L // blocks.queries, blocks.queries, L // blocks.keys, blocks.keys)
        full_BxIxJ = np.asarray(range_mask(starts, ends, L)).reshape(shape).all((2, 4))
        keys = block_ranges.key_blocks(starts, ends, blocks)
        unmasked_BxIxJ = (keys.full_first[..., None] <= j_J) & (j_J < keys.full_end[..., None])
        np.testing.assert_array_equal(unmasked_BxIxJ, full_BxIxJ)
        queries = block_ranges.query_blocks(starts, ends, blocks)
        unmasked_BxIxJ = (queries.full_first[:, None] <= i_Ix1) & (i_Ix1 < queries.full_end[:, None])
        assert not (unmasked_BxIxJ & ~full_BxIxJ).any()
        assert (unmasked_BxIxJ.any(1) == full_BxIxJ.any(1)).all()


@pytest.mark.parametrize("axis", [1, 2])
def test_prefetch_indices_of_splash(axis):
    seen = np.random.default_rng(0).random((4, 5, 5)) < 0.4
    seen[0] = False
    fetched = np.moveaxis(np.asarray(splash.next_seen(jnp.asarray(seen), axis)), axis, -1).reshape(-1, 5)
    for row, found in zip(np.moveaxis(seen, axis, -1).reshape(-1, 5), fetched, strict=True):
        places = np.flatnonzero(row)
        for j in range(5):
            later = places[places >= j]
            assert found[j] == (later[0] if len(later) else places[-1] if len(places) else 0)


@pytest.mark.parametrize("backend", [*INTERPRETED, "xla"])
def test_gradients_of_a_model_equal_those_of_xla_attention(backend, on_its_platform, monkeypatch):
    """With the scan over layers, remat, and a mesh that shards rows and heads."""
    config = tiny_model()
    config.d_model = config.num_heads * K
    config.remat = "full"
    params = far_from_initial(config, 0.1)
    rows = batch([packed([100, 90, 300], 256)] * 4)
    examples = jax.tree.map(
        lambda *parts: np.concatenate(parts),
        *(rewritten(name, jax.tree.map(lambda x: x[:2], rows)) for name in ("prefix", "masked_diffusion")),
    )

    def gradients():

        def loss(params):
            return example_loss(bind(config, params), examples, chunk=64)[0]

        return jax.jit(jax.value_and_grad(loss))(params)

    config.attention = "xla"
    expected = gradients()
    config.attention = backend
    if backend == "xla":
        monkeypatch.setattr(attention, "QUERIES", 64)  # 64 queries at a time instead of all 256
    else:
        on_its_platform(backend)
    with jax.set_mesh(mesh(data=2, tensor=2)):
        found = gradients()
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_remat_matmuls_saves_the_outputs_of_the_kernel(kv_heads, monkeypatch):
    """The backward pass does not run the forward kernel again."""
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    config = tiny_model()
    config.num_kv_heads = kv_heads
    config.attention = "splash"
    params = far_from_initial(config, 0.1)
    example = rewritten("causal", batch([packed([128], 128)]))

    def runs(remat: str) -> int:
        config.remat = remat
        step = jax.jit(jax.grad(lambda params: example_loss(bind(config, params), example, chunk=64)[0]))
        text = step.trace(params).lower(lowering_platforms=("tpu",)).as_text()
        return text.count("splash_mha_fwd")

    assert runs("full") == 2 * runs("matmuls") > 0


@each_kernel
def test_auto_selects_the_kernel_for_supported_shapes(kernel, on_its_platform, monkeypatch):
    on_its_platform(kernel)
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # splash needs a mesh on several devices
    taken = []
    module = {"splash": splash, "flash": flash}[kernel]
    monkeypatch.setattr(module, f"attend_{kernel}", lambda q, *_: taken.append(q.shape) or q)
    for length in (128, 100):
        start = jnp.zeros((1, length), jnp.int32)
        attend(*jnp.ones((3, 1, length, H, K)), start, start + 1)
    assert taken == [(1, 128, H, K)]


@each_kernel
def test_unsupported_shapes_are_rejected(kernel, on_its_platform):
    def call(length, heads=H, head_dim=K):
        start = jnp.zeros((4, length), jnp.int32)
        q = jnp.ones((4, length, heads, head_dim))
        jax.eval_shape(lambda q: attend(q, q, q, start, start + 1, kernel), q)

    with pytest.raises(UserError, match="needs (TPUs|NVIDIA GPUs), not cpu"):
        call(128)
    on_its_platform(kernel)
    with pytest.raises(UserError, match="multiple of (128|64), not 100"):
        call(100)
    if kernel == "flash":
        with pytest.raises(UserError, match="a power of two of at least 16, not 24"):
            call(128, head_dim=24)
    with (
        jax.set_mesh(mesh(data=1, tensor=4)),
        pytest.raises(UserError, match="number of heads that is a multiple of 4"),
    ):
        call(128)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="lowering for GPUs takes CUDA's plugin")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flash_can_be_lowered_for_gpus(kv_heads):
    q, k = (jax.ShapeDtypeStruct((2, 1024, heads, 64), jnp.bfloat16) for heads in (4, kv_heads))
    range_ = jax.ShapeDtypeStruct((2, 1024), jnp.int32)

    def both_passes(q, k, v, start, end):
        out, pull = jax.vjp(lambda *qkv: flash.attend_flash(*qkv, start, end), q, k, v)
        return out, pull(out)

    traced = jax.jit(both_passes).trace(q, k, k, range_, range_)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("flash_forward", "flash_backward_queries", "flash_backward_keys"):
        assert kernel in text
    assert "1024x1024" not in text
