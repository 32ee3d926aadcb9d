"""The train step: gradient accumulation, sharding, metrics, recompilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.aot.hlo import analyze
from dualsm.config import default_config
from dualsm.devices import sharding
from dualsm.model import transformer
from dualsm.objectives.example import Row, SpecialIds
from dualsm.process.errors import UserError
from dualsm.training.objective_loss import objective_loss

from .conftest import Micro


def assert_trees_close(a, b, **tolerance):
    for path, (x, y) in zip(
        jax.tree_util.tree_flatten_with_path(a)[0],
        zip(*map(jax.tree.leaves, (a, b)), strict=True),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path[0]), **tolerance)


@pytest.mark.parametrize("gradient_accumulation_steps", [2, 4])
def test_gradient_accumulation_equals_the_whole_batch(micro_step, gradient_accumulation_steps):
    """Uses plain gradient descent, whose update is proportional to the gradient."""
    states = [
        Micro(gradient_accumulation_steps=m, **{"optimizer.name": "adamw"}).run(3)
        for m in (1, gradient_accumulation_steps)
    ]
    assert_trees_close(states[0].metrics, states[1].metrics, rtol=1e-5)
    assert_trees_close(states[0].params, states[1].params, atol=2e-5)
    # The mean of the means of the parts would be different.
    batch = micro_step.batch()
    valid = (batch.documents_BxL1[:, 1:] == batch.documents_BxL1[:, :-1]) & (batch.documents_BxL1[:, 1:] >= 0)
    assert valid.sum(1).max() > 2 * valid.sum(1).min()


LAYOUTS = [
    {"data": 8},
    {"data": 2, "fsdp": 4},
    {"data": 4, "tensor": 2},
    {"replica": 2, "data": 1, "fsdp": 2, "tensor": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sharded_equals_unsharded(micro_step, layout):
    config = default_config().mesh
    config.update(layout)
    mesh = sharding.make_mesh(config, jax.devices())
    shapes = jax.eval_shape(micro_step.init)
    places = sharding.tree_shardings(mesh, shapes)
    with jax.set_mesh(mesh):
        state = jax.jit(micro_step.init, out_shardings=places)()
        step = jax.jit(micro_step.step, donate_argnums=0, out_shardings=(places, None))
        for s in range(3):
            batch = jax.tree.map(lambda rows: sharding.shard_batch(mesh, rows), micro_step.batch(s))
            state, _ = step(state, batch)
    expected = micro_step.run(3)
    assert_trees_close(state.metrics, expected.metrics, rtol=1e-4)
    assert_trees_close(state.params, expected.params, atol=1e-4)

    # Matrices and momenta are sharded over fsdp and tensor, not replicated.
    parts = layout.get("fsdp", 1) * layout.get("tensor", 1)
    for name in ("query", "key", "value", "output"):
        kernel = state.params["blocks"]["attention"][name]["kernel"]
        assert kernel.addressable_shards[0].data.size * parts == kernel.size
    first = sum(a.addressable_shards[0].data.size for a in jax.tree.leaves(state.opt_state))
    assert first < 1.2 * sum(a.size for a in jax.tree.leaves(expected.opt_state)) / parts


SWITCHES = {
    "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "tie_word_embeddings": True, "head": "plain",
    "qkv_bias": True, "qk_norm": "projection", "norm_placement": "post", "no_rope_layer_interval": 2,
    "rope_scaling.name": "llama3", "rope_scaling.original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [({"data": 2, "tensor": 4}, "adamw"), ({"data": 2, "fsdp": 2, "tensor": 2}, "muon")],
    ids=str,
)
def test_a_model_with_every_switch_is_sharded_like_any_other(layout, optimizer):
    """Also where there are more shards than heads of keys."""
    changes = {f"model.{key}": value for key, value in SWITCHES.items()}
    micro = Micro(**changes, **{"optimizer.name": optimizer, "optimizer.learning_rate": 1e-3})
    config = default_config().mesh
    config.update(layout)
    mesh = sharding.make_mesh(config, jax.devices())
    places = sharding.tree_shardings(mesh, jax.eval_shape(micro.init))
    with jax.set_mesh(mesh):
        state = jax.jit(micro.init, out_shardings=places)()
        step = jax.jit(micro.step, donate_argnums=0, out_shardings=(places, None))
        for s in range(2):
            batch = jax.tree.map(lambda rows: sharding.shard_batch(mesh, rows), micro.batch(s))
            state, _ = step(state, batch)
    expected = micro.run(2)
    assert_trees_close(state.metrics, expected.metrics, rtol=1e-4)
    assert_trees_close(state.params, expected.params, atol=1e-4)
    attention = state.params["blocks"]["attention"]
    for part in (attention["key"]["kernel"], attention["key"]["bias"]):
        assert part.addressable_shards[0].data.size < part.size
    assert set(attention) == {"norm", "query", "key", "value", "output", "query_norm", "key_norm"}
    assert set(state.params["head"]) == {"norm"}


@pytest.mark.parametrize(
    ("layout", "gradient_accumulation_steps", "once"),
    [
        ({"data": 4}, 1, True),
        ({"data": 4}, 2, True),
        ({"replica": 2, "data": 2}, 2, True),
        ({"data": 2, "fsdp": 2}, 2, False),
    ],
    ids=str,
)
def test_replicas_sum_gradients_once_per_step(layout, gradient_accumulation_steps, once):
    """Not once per layer or accumulation step; the result equals that of one device."""
    config = default_config().mesh
    config.update(layout)
    mesh = sharding.make_mesh(config, jax.devices()[:4])
    micro = Micro(gradient_accumulation_steps=gradient_accumulation_steps, **{"optimizer.name": "adamw"})
    places = sharding.tree_shardings(mesh, jax.eval_shape(micro.init))
    with jax.set_mesh(mesh):
        state = jax.jit(micro.init, out_shardings=places)()
        batch = jax.tree.map(lambda rows: sharding.shard_batch(mesh, rows), micro.batch())
        step = jax.jit(micro.step, out_shardings=(places, None)).lower(state, batch).compile()
        state, _ = step(state, batch)
    expected = Micro(**{"optimizer.name": "adamw"}).run()
    assert_trees_close(state.metrics, expected.metrics, rtol=1e-5)
    assert_trees_close(state.params, expected.params, atol=2e-5)
    work = analyze(step.as_text(), 4)
    assert (work.collective_count == {"all-reduce": 1}) == once
    sent = sum(work.collective_bytes.values())
    ring = 2 * 3 / 4 * sum(x.nbytes for x in jax.tree.leaves(expected.params))
    assert sent > 0.9 * ring
    assert (sent < 1.2 * ring) == once


def test_metrics_equal_the_losses_of_single_objectives(micro_step):
    """The metrics of an objective equal `objective_loss` of its rows."""
    config, batch = micro_step.config, micro_step.batch()
    state = jax.jit(micro_step.init)()
    _, sums = jax.jit(micro_step.step)(state, batch)
    j = micro_step.names.index("causal")
    mine = batch.objective_B == j
    rows = Row(*(jnp.asarray(a[mine]) for a in batch[:2]), *[jnp.ones(mine.sum())] * 3)
    loss = objective_loss("causal", config.model, SpecialIds())
    weighted, weight, _ = loss(state.params, rows, jax.random.key(0))
    assert float(sums.nll_J[j]) == pytest.approx(float(weighted), rel=1e-5)
    assert float(sums.loss_denominator_J[j]) == float(weight)
    assert float(sums.weight) == pytest.approx(float(sums.loss_denominator_J.sum()))


def test_metrics_are_summed_since_the_last_log_line(micro_step):
    step, state = jax.jit(micro_step.step), jax.jit(micro_step.init)()
    steps = []
    for s in range(5):  # a log line every 2 steps
        state, sums = step(state, micro_step.batch(s))
        steps.append(float(sums.steps))
    assert steps == [1, 2, 1, 2, 1]


def test_objective_weight_scales_the_gradient_but_not_its_metric():
    plain, double = Micro(), Micro(**{"objectives.causal.weight": 2.0})
    a, b = plain.run().metrics, double.run().metrics
    assert_trees_close(a.nll_J, b.nll_J, rtol=1e-6)
    assert_trees_close(a.weight, b.weight)
    j = plain.names.index("causal")
    assert float(b.loss - a.loss) == pytest.approx(float(a.nll_J[j]), rel=1e-4)
    assert float(b.gradient_norm) > 1.2 * float(a.gradient_norm)


def test_changed_shares_do_not_recompile(micro_step):
    step, state = jax.jit(micro_step.step), jax.jit(micro_step.init)()
    for objective_B in ([0] * 8, [2] * 8, [0, 1, 2, 0, 1, 2, 0, 1]):
        batch = micro_step.batch()._replace(objective_B=np.array(objective_B, np.int32))
        state, _ = step(state, batch)
    assert step._cache_size() == 1


def test_steps_draw_different_corruption():
    """The same batch is corrupted differently at another step, and identically at the same step."""
    micro = Micro(**{"mixture.causal": 0.0, "mixture.prefix": 0.0, "mixture.masked_diffusion": 1.0})
    state, step = jax.jit(micro.init)(), jax.jit(micro.step)
    losses = [float(step(state._replace(step=jnp.int32(s)), micro.batch())[1].loss) for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_mesh_that_does_not_match_the_devices_is_rejected():
    config = default_config().mesh
    for sizes, message in (
        ({"data": 3}, "needs 3 devices, there are 8"),
        ({"data": -1, "fsdp": 3}, "does not fill 8"),
        ({"data": -1, "fsdp": -1}, "does not fill 8"),
    ):
        config.update({"replica": 1, "data": 1, "fsdp": 1, "tensor": 1} | sizes)
        with pytest.raises(UserError, match=message):
            sharding.make_mesh(config, jax.devices())


def test_axis_that_does_not_divide_a_parameter_is_rejected(micro_step):
    config = default_config().mesh
    config.update({"data": 1, "tensor": 8})
    mesh = sharding.make_mesh(config, jax.devices())
    shapes = jax.eval_shape(lambda: transformer.init_params(micro_step.config.model, jax.random.key(0)))
    assert sharding.tree_shardings(mesh, shapes)
    shapes["blocks"]["mlp"]["down"]["kernel"] = jax.ShapeDtypeStruct((2, 65, 32), jnp.float32)
    with pytest.raises(UserError, match=r"config.mesh.tensor=8 does not divide .*\(65\)"):
        sharding.tree_shardings(mesh, shapes)
