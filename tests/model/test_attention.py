"""Attention with key ranges, compared with a loop over queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.devices import sharding
from dualsm.model import attention
from dualsm.model.attention import attend, range_mask
from dualsm.training.loop import train
from tests.micro import micro_config

B, L, H, K = 2, 12, 3, 8


@pytest.fixture(scope="module")
def qkv():
    return jax.random.normal(jax.random.key(0), (3, B, L, H, K))


@pytest.fixture(scope="module")
def ranges():
    """Returns random non-empty key ranges."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, L, (B, L))
    return jnp.asarray(start), jnp.asarray(start + 1 + rng.integers(0, L - start))


@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_each_query_attends_only_to_its_range(qkv, ranges, backend):
    q, k, v = qkv
    start, end = ranges
    ours = attend(q, k, v, start, end, backend)
    for b in range(B):
        for i in range(L):
            seen = slice(int(start[b, i]), int(end[b, i]))
            scores = jnp.einsum("hk,shk->hs", q[b, i], k[b, seen]) / K**0.5
            expected = jnp.einsum("hs,shk->hk", jax.nn.softmax(scores, -1), v[b, seen])
            np.testing.assert_allclose(ours[b, i], expected, atol=1e-5)


def test_keys_outside_the_range_have_no_influence(qkv, ranges):
    q, k, v = qkv
    start, end = ranges
    seen = np.asarray(range_mask(start, end, L))

    def output(k, v):
        return attend(q, k, v, start, end).sum((-1, -2))

    for gradient in jax.jacrev(output, (0, 1))(k, v):
        influence = np.abs(gradient).max((-1, -2))  # [B, L, B, L]
        for b in range(B):
            assert not influence[b, :, b][~seen[b]].any()
            assert not influence[b, :, 1 - b].any()


def test_long_rows_have_no_array_of_all_scores(monkeypatch):
    length = 6 * attention.QUERIES
    q, k, v = jax.random.normal(jax.random.key(1), (3, 1, length, 1, K))
    start = np.random.default_rng(1).integers(0, length, (1, length))
    ranges = jnp.asarray(start), jnp.asarray(start + 1 + np.random.default_rng(2).integers(0, length - start))

    def compiled():
        def run(q, k, v):
            out, pull = jax.vjp(lambda *qkv: attend(*qkv, *ranges), q, k, v)
            return out, *pull(jnp.cos(out))

        return jax.jit(run).lower(q, k, v).compile()

    parts = compiled()
    monkeypatch.setattr(attention, "QUERIES", length)
    whole = compiled()
    for ours, expected in zip(parts(q, k, v), whole(q, k, v), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert parts.memory_analysis().temp_size_in_bytes < 4 * length**2
    assert whole.memory_analysis().temp_size_in_bytes > 4 * length**2


def test_bfloat16_inputs_give_bfloat16_outputs(qkv, ranges):
    out = attend(*qkv.astype(jnp.bfloat16), *ranges)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), attend(*qkv, *ranges), atol=0.05)


def test_unknown_backend_is_rejected(qkv, ranges):
    with pytest.raises(ValueError, match="telepathy"):
        attend(*qkv, *ranges, backend="telepathy")


@pytest.mark.parametrize(
    ("platform", "length", "because"),
    [
        ("tpu", 256, None),
        ("tpu", 100, "a sequence length that is a multiple of 128, not 100"),
        ("gpu", 256, None),
        ("gpu", 100, "a sequence length that is a multiple of 64, not 100"),
        ("cpu", 256, "no kernel for cpu"),
    ],
)
def test_auto_returns_why_it_selects_xla_attention(monkeypatch, platform, length, because):
    """Platform and number of devices are replaced, because the test has no accelerator."""
    monkeypatch.setattr("dualsm.devices.sharding.platform", lambda: platform)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    reason = attention.why_not_kernel((2, length, 4, 64), (2, length, 4, 64))
    assert reason is None if because is None else because in reason


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_splash_needs_a_mesh_on_several_devices(monkeypatch, platform):
    """JAX cannot divide Mosaic kernels by itself. The platform is replaced, because the test has no TPU."""
    monkeypatch.setattr("dualsm.devices.sharding.platform", lambda: platform)
    shapes = (8, 256, 4, 64), (8, 256, 4, 64)
    assert bool(attention.why_not_kernel(*shapes)) == (platform == "tpu")
    mesh = micro_config().mesh
    mesh.data = -1
    with jax.set_mesh(sharding.make_mesh(mesh, jax.devices())):
        assert attention.why_not_kernel(*shapes) is None


def test_run_on_an_accelerator_warns_of_xla_attention(micro, tmp_path, monkeypatch, capsys):
    micro.mesh.data = -1
    train(micro, tmp_path / "cpu", stop=lambda step: True)
    assert "uses XLA attention" not in capsys.readouterr().err
    monkeypatch.setattr("dualsm.devices.sharding.platform", lambda: "gpu")
    train(micro, tmp_path / "gpu", stop=lambda step: True)
    assert "config.model.attention=auto uses XLA attention, not a kernel: " in capsys.readouterr().err
