"""Loss and gradient of pairs of objectives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dualsm.model.transformer import bind
from dualsm.objectives import mixture
from dualsm.objectives.example import Row, SpecialIds
from dualsm.objectives.pairs import bind_members
from dualsm.training.objective_loss import example_loss
from dualsm.training.step import make_train_step

from .conftest import Micro
from .test_step import assert_trees_close

OFF = {"mixture.causal": 0.0, "mixture.prefix": 0.0, "mixture.masked_diffusion": 0.0}


class PairedMicro(Micro):
    """Micro steps of plain gradient descent with learning rate 1: the update is the negative gradient."""

    def __init__(self, **changes):
        super().__init__(**OFF | {"model.num_layers": 1, "model.remat": "none"} | changes)
        self.optimizer = optax.sgd(1.0)
        self.step = make_train_step(self.config, self.entries, SpecialIds(vocab_size=128), self.optimizer)

    def batch(self, step: int = 0):
        batch = super().batch(step)
        special_BxL1 = batch.tokens_BxL1 % 7 == 0  # never masked, so that the denominators differ
        return batch._replace(tokens_BxL1=np.where(special_BxL1, 2, batch.tokens_BxL1))


def member_loss(micro: Micro, params: dict, j: int, with_z_loss: bool = True) -> jax.Array:
    """Returns the loss of one member on its rows of the first batch, and its denominator."""
    batch, config = micro.batch(), micro.config
    z_loss = config.loss.z_loss * with_z_loss
    mine = np.flatnonzero(batch.objective_B == j)
    keys_B = mixture.row_keys(jax.random.fold_in(jax.random.key(config.seed), 0), len(batch.objective_B))
    rows = Row(
        *(jnp.asarray(a[mine]) for a in (batch[0], batch[1], batch[3], batch[4])), jnp.zeros(len(mine))
    )
    members = [member for entry in micro.entries for member in entry.members]
    objective = bind_members(members, SpecialIds(vocab_size=128))[j]
    example = jax.vmap(objective)(rows, keys_B[mine])
    model = bind(config.model, params)
    total, denominator, _ = example_loss(model, example, config.loss.chunk_size, z_loss)
    return total / denominator, denominator


def difference(micro: Micro) -> tuple[dict, dict, object]:
    """Returns the parameters before a step, their gradient, and the metrics of the step."""
    state = jax.jit(micro.init)()
    new, metrics = jax.jit(micro.step)(state, micro.batch())
    return state.params, jax.tree.map(jnp.subtract, state.params, new.params), metrics


@pytest.mark.parametrize(("pair", "accumulation"), [("mir", 4), ("nemotron", 1)])
def test_gradient_of_a_pair_is_the_weighted_sum_of_its_members(pair, accumulation):
    accumulated = {"gradient_accumulation_steps": accumulation}
    micro = PairedMicro(**{f"mixture.{pair}": 1.0, "loss.z_loss": 0.1} | accumulated)
    params, gradient, metrics = difference(micro)
    one, two = micro.entries[0].members

    @jax.jit
    @jax.value_and_grad
    def expected(params):
        return sum(member.weight * member_loss(micro, params, j)[0] for j, member in enumerate((one, two)))

    _, wanted = expected(params)
    assert_trees_close(gradient, wanted, atol=1e-6, rtol=1e-4)
    batch = micro.batch()
    rows = [batch.tokens_BxL1[batch.objective_B == j] for j in (0, 1)]
    assert (rows[0] == rows[1]).all() and len(rows[0]) == 4
    assert float(metrics.weight) == float(metrics.loss_denominator_J[0])  # tokens count once


def test_a_pair_and_an_objective_are_weighted_by_their_sequences():
    """The weight of an objective is a factor on its nats, that of a pair's member also on its z-loss."""
    shares = {"mixture.nemotron": 0.5, "mixture.causal": 0.5, "objectives.causal.weight": 2.0}
    micro = PairedMicro(**shares, **{"loss.z_loss": 0.1})
    params, gradient, _ = difference(micro)

    @jax.jit
    @jax.grad
    def expected(params):
        (single, d0), (one, d1), (two, _) = (member_loss(micro, params, j) for j in range(3))
        nats, _ = member_loss(micro, params, 0, with_z_loss=False)
        return (d0 * (single + nats) + d1 * (one + 0.3 * two)) / (d0 + d1)

    assert_trees_close(gradient, expected(params), atol=1e-6, rtol=1e-4)
