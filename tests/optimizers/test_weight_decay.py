"""Schedules of the weight decay, exempt parameters, and AdamW's own learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.config import check_config, default_config
from dualsm.optimizers.optimizer import at_step, make_optimizer
from dualsm.process.errors import UserError

STEPS, PEAK, DECAY = 10, 0.02, 0.5


def optimizer_config(**changes):
    config = default_config().optimizer
    config.learning_rate, config.weight_decay = PEAK, DECAY
    for key, value in changes.items():
        *folders, name = key.split(".")
        (config[folders[0]] if folders else config)[name] = value
    return config


def learning_rate(step):
    return PEAK * (1 - step / STEPS)


def parameters() -> dict:
    rng = np.random.default_rng(0)
    return {
        "embedding": {"embedding": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)},
        "blocks": {
            "mlp": {
                "down": {"kernel": jnp.asarray(rng.normal(size=(2, 4, 4)), jnp.float32)},
                "norm": {"scale": jnp.ones((2, 4))},
            }
        },
        "head": {"output": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}},
    }


def updates(config, step: int, gradient: float = 0.0) -> dict:
    """Returns the updates of a step by parameter, for a constant gradient."""
    params = parameters()
    optimizer = make_optimizer(config, learning_rate, STEPS)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, gradient), params)
    found, _ = optimizer.update(grads, at_step(optimizer.init(params), jnp.int32(step)), params)
    return found


def removed(config, step: int) -> dict:
    """Returns the fraction of each parameter that a step with zero gradient removes."""
    found = updates(config, step)
    return jax.tree.map(lambda u, p: float(-(u / p).mean()), found, parameters())


@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize(
    ("name", "independent", "expected"),
    [
        ("learning_rate", False, lambda step: DECAY * learning_rate(step)),
        ("constant", False, lambda step: DECAY * PEAK),
        ("linear", False, lambda step: DECAY * PEAK * (1 - 0.8 * step / STEPS)),
        ("learning_rate", True, lambda step: DECAY * learning_rate(step) / PEAK),
        ("constant", True, lambda step: DECAY),
        ("linear", True, lambda step: DECAY * (1 - 0.8 * step / STEPS)),
    ],
)
def test_schedules(name, independent, expected, step):
    schedule = {"name": name, "independent": independent, "final_fraction": 0.2}
    config = optimizer_config(**{f"weight_decay_schedule.{key}": value for key, value in schedule.items()})
    for fraction in jax.tree.leaves(removed(config, step)):
        assert fraction == pytest.approx(expected(step), rel=1e-5)


def test_exempt_parameters_do_not_decay_and_others_are_unaffected():
    config = optimizer_config(weight_decay_exempt="embeddings,vectors")
    found, plain = updates(config, 3, gradient=0.1), updates(optimizer_config(), 3, gradient=0.1)
    without = updates(optimizer_config(weight_decay=0.0), 3, gradient=0.1)
    kept = {"embedding": found["embedding"], "norm": found["blocks"]["mlp"]["norm"]}
    kept["bias"] = found["head"]["output"]["bias"]
    expected = {"embedding": without["embedding"], "norm": without["blocks"]["mlp"]["norm"]}
    expected["bias"] = without["head"]["output"]["bias"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), kept, expected)
    for path in (("blocks", "mlp", "down"), ("head", "output")):
        a, b = found, plain
        for name in (*path, "kernel"):
            a, b = a[name], b[name]
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("exempt", ["embeddings", "output", "vectors", "embeddings,output"])
def test_exactly_the_exempt_groups_do_not_decay(exempt):
    found = removed(optimizer_config(weight_decay_exempt=exempt), 3)
    fractions = {
        "embeddings": [found["embedding"]["embedding"]],
        "output": [found["head"]["output"]["kernel"]],
        "vectors": [found["head"]["output"]["bias"], found["blocks"]["mlp"]["norm"]["scale"]],
        "matrices": [found["blocks"]["mlp"]["down"]["kernel"]],
    }
    for group, values in fractions.items():
        assert all((value == 0) == (group in exempt.split(",")) for value in values), group


@pytest.mark.parametrize("exempt", ["", "output"])
def test_adamw_has_its_own_learning_rate(exempt):
    """Weight decay, with and without exempt parameters, is multiplied by this learning rate."""
    config = optimizer_config(adamw_learning_rate=3 * PEAK, weight_decay_exempt=exempt)
    plain = updates(optimizer_config(weight_decay_exempt=exempt), 3, gradient=0.1)
    found = updates(config, 3, gradient=0.1)
    np.testing.assert_array_equal(
        found["blocks"]["mlp"]["down"]["kernel"], plain["blocks"]["mlp"]["down"]["kernel"]
    )
    for name in ("embedding", "head"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 3 * b, rtol=1e-5), found[name], plain[name])


def test_impossible_values_are_rejected():
    config = default_config()
    config.optimizer.weight_decay_exempt = "matrices"
    with pytest.raises(UserError, match="config.optimizer.weight_decay_exempt=matrices must list some of"):
        check_config(config)
    config.optimizer.weight_decay_exempt = ""
    config.optimizer.name, config.optimizer.adamw_learning_rate = "adamw", 1e-3
    with pytest.raises(UserError, match="has no effect with config.optimizer.name=adamw"):
        check_config(config)
