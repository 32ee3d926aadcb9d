"""The chunked cross-entropy has the value and gradient of the textbook loss, and uses less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.model.cross_entropy import cross_entropy

B, L, D, V = 3, 10, 8, 40


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 6)
    return {
        "features": jax.random.normal(keys[0], (B, L, D)),
        "kernel": jax.random.normal(keys[1], (D, V)),
        "bias": jax.random.normal(keys[2], (V,)),
        "targets": jax.random.randint(keys[3], (B, L), 0, V),
        "weights": jax.random.uniform(keys[4], (B, L)) * (jax.random.uniform(keys[5], (B, L)) > 0.3),
    }


def plain(features, kernel, bias, targets, weights, z_weights):
    logits = features @ kernel + bias
    normalizer = jax.nn.logsumexp(logits, -1)
    nll = normalizer - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (weights * nll).sum() + (z_weights * normalizer**2).sum(), nll


@pytest.mark.parametrize("chunk", [1, 4, 5, 10, 64])  # 4 does not divide the row, 64 is longer than it
def test_value_and_gradient_equal_the_textbook_loss(inputs, chunk):
    rest = (inputs["targets"], inputs["weights"], 0.1 * inputs["weights"])
    arguments = (inputs["features"], inputs["kernel"], inputs["bias"])

    def sliced(*arguments):
        total, nll = cross_entropy(*arguments, *rest, chunk)
        return 3 * total, nll

    def whole(*arguments):
        total, nll = plain(*arguments, *rest)
        return 3 * total, nll

    for options in ({"has_aux": True},):
        (total, nll), grads = jax.value_and_grad(sliced, (0, 1, 2), **options)(*arguments)
        (total_plain, nll_plain), grads_plain = jax.value_and_grad(whole, (0, 1, 2), **options)(*arguments)
    np.testing.assert_allclose(total, total_plain, rtol=1e-5)
    np.testing.assert_allclose(nll, nll_plain, atol=1e-4)
    for ours, theirs in zip(grads, grads_plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
    np.testing.assert_allclose(sliced(*arguments)[0], total, rtol=1e-6)  # without differentiation


def test_sums_of_bfloat16_features_are_float32(inputs):
    arguments = [inputs[name].astype(jnp.bfloat16) for name in ("features", "kernel", "bias")]
    total, nll = cross_entropy(*arguments, inputs["targets"], inputs["weights"], inputs["weights"] * 0, 5)
    assert total.dtype == nll.dtype == jnp.float32
    grads = jax.grad(
        lambda *a: cross_entropy(*a, inputs["targets"], inputs["weights"], inputs["weights"] * 0, 5)[0],
        (0, 1, 2),
    )(*arguments)
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 3


def test_memory_is_far_below_that_of_all_logits():
    batch, length, vocab_size = 4, 256, 4096
    logits_bytes = batch * length * vocab_size * 4
    shapes = [(batch, length, D), (D, vocab_size), (vocab_size,)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    targets = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((batch, length), jnp.float32)

    def temporaries(loss):
        step = jax.jit(jax.grad(lambda *a: loss(*a)[0], (0, 1, 2)))
        return (
            step.lower(*arguments, targets, weights, weights).compile().memory_analysis().temp_size_in_bytes
        )

    assert temporaries(plain) >= logits_bytes
    assert temporaries(lambda *a: cross_entropy(*a, 16)) < logits_bytes / 4
