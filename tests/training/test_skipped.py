"""Non-finite updates are skipped and counted, and end the run if they continue; loss spikes are reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.config import default_config
from dualsm.optimizers.optimizer import OPTIMIZERS
from dualsm.optimizers.schedules import learning_rate
from dualsm.process.errors import UserError
from dualsm.rundir.metrics import read_metrics
from dualsm.training.loop import train
from dualsm.training.step_metrics import LossStats, update_loss_stats

from .conftest import Micro

POISON = 100  # the token with the embedding NaN


def poisoned(micro):
    """Returns the initial state of a model in which one token has the embedding NaN."""
    state = jax.jit(micro.init)()
    embedding = state.params["embedding"]["embedding"].at[POISON].set(jnp.nan)
    return state._replace(params=state.params | {"embedding": {"embedding": embedding}})


def batch(micro, number: int, bad: bool):
    """Returns a batch with or without the poisoned token."""
    batch = micro.batch(number)
    tokens = np.where(batch.tokens_BxL1 == POISON, POISON + 1, batch.tokens_BxL1)
    tokens[2:, 5] = POISON if bad else tokens[2:, 5]
    return batch._replace(tokens_BxL1=tokens)


@pytest.fixture(scope="module")
def steps(micro_step):
    """Returns state and metrics after steps with good, bad, bad and good batches."""
    state, step, after = poisoned(micro_step), jax.jit(micro_step.step), []
    for number, bad in enumerate([False, True, True, False]):
        state, sums = step(state, batch(micro_step, number, bad))
        after.append((state, sums))
    return after


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)


def test_bad_batch_does_not_change_weights_or_optimizer_state(steps):
    (good, _), (bad, _), (worse, _), (again, _) = steps
    for state in (bad, worse):
        assert same((state.params, state.opt_state), (good.params, good.opt_state))
    assert not same(again.params, good.params)


def test_skipped_steps_are_counted_and_steps_continue(steps):
    assert [int(state.step) for state, _ in steps] == [1, 2, 3, 4]
    assert [int(sums.consecutive_skips) for _, sums in steps] == [0, 1, 2, 0]
    # The micro config logs every 2 steps.
    assert [int(sums.skipped) for _, sums in steps] == [0, 1, 1, 1]
    assert [int(sums.steps) for _, sums in steps] == [1, 1, 0, 1]


def test_bad_batches_do_not_enter_the_metrics(steps):
    assert all(np.isfinite(jax.tree.leaves(sums)[0]).all() for _, sums in steps)
    (_, first), (_, second), *_ = steps
    assert float(first.loss) == float(second.loss)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rate_depends_on_the_step_not_on_updates(name):
    """The decay ends with the run even if updates are skipped."""
    config = default_config().optimizer
    rate = learning_rate(config, steps=8)  # falls from step 6 on
    micro = Micro(rate, **{"optimizer.name": name})
    state, step = poisoned(micro), jax.jit(micro.step)
    for number in range(7):
        state, _ = step(state, batch(micro, number, bad=number % 2 == 1))
    assert int(state.step) == 7 and float(rate(7)) < float(rate(6))
    now = Micro(lambda _: rate(7), **{"optimizer.name": name})
    for ours, expected in zip(
        *(jax.tree.leaves(jax.jit(m.step)(state, batch(m, 7, False))[0].params) for m in (micro, now)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-8)


def test_diverged_run_fails_and_names_the_last_checkpoint(micro, tmp_path, capsys):
    micro.mesh.data = -1
    micro.max_consecutive_skips = 3
    assert train(micro, tmp_path / "good") is True
    fork = micro.copy_and_resolve_references()
    fork.start.run, fork.start.step = str(tmp_path / "good"), 8
    fork.steps, fork.optimizer.learning_rate = 16, 1e30
    with pytest.raises(UserError, match="diverged: the updates of steps 10 to 12") as error:
        train(fork, tmp_path / "bad")
    assert "\n" not in str(error.value)
    assert "step 10: the loss or its gradient is not finite" in capsys.readouterr().err
    assert all(np.isfinite(list(record.values())).all() for record in read_metrics(tmp_path / "bad"))


def spikes_of(losses_SxJ, tokens_SxJ) -> list[int]:
    """Returns the steps that are reported as spikes, given losses and tokens of each objective per step."""
    losses_SxJ, tokens_SxJ = (np.asarray(a, np.float32) for a in (losses_SxJ, tokens_SxJ))
    loss_stats, update, spikes = (
        LossStats(*jnp.zeros((4, tokens_SxJ.shape[1]))),
        jax.jit(update_loss_stats),
        [],
    )
    for step, (loss_J, tokens_J) in enumerate(zip(losses_SxJ, tokens_SxJ, strict=True)):
        loss_stats, is_spike = update(loss_stats, loss_J * tokens_J, tokens_J)
        if is_spike:
            spikes.append(step)
    return spikes


def test_spikes_are_detected_in_a_noisy_falling_loss():
    """Noise is not reported, a high loss is, and one spike does not hide the next."""
    rng, steps_S = np.random.default_rng(0), np.arange(400)
    loss_S = 3 + 5 * np.exp(-steps_S / 40) + 0.1 * rng.standard_normal(400)
    loss_S[[200, 203]] += 4
    assert spikes_of(loss_S[:, None], np.full((400, 1), 1000)) == [200, 203]


def test_first_steps_are_not_spikes():
    assert spikes_of([[1.0]] * 10 + [[50.0]], np.full((11, 1), 1000)) == []


ROWS = 64
PLANS = {
    "phases": [(1, 0)] * 150 + [(0, 1)] * 150 + [(1, 0)] * 150,
    "a small share": [(1, 0)] * 150 + [(1 / ROWS, 1 - 1 / ROWS)] * 150 + [(1, 0)] * 150,
    "a large share": [(1 / ROWS, 1 - 1 / ROWS)] * 150 + [(1 - 1 / ROWS, 1 / ROWS)] * 300,
    "alternating steps": [(1, 0), (0, 1)] * 225,
    "linear": [(1 - step / 450, step / 450) for step in range(450)],
}


@pytest.mark.parametrize("plan", PLANS)
def test_change_of_the_mixture_is_not_a_spike(plan):
    """Two objectives with different losses, one of them noisy; real spikes are still detected.

    An objective that is trained again after a pause starts with a higher loss.
    """
    rng, shares_SxJ = np.random.default_rng(0), np.array(PLANS[plan])
    rows_SxJ = np.round(shares_SxJ * ROWS)
    noise_SxJ = rng.standard_normal(rows_SxJ.shape) * [0.3, 2.0] / np.sqrt(np.maximum(rows_SxJ, 1))
    losses_SxJ = [3.0, 6.0] + noise_SxJ
    if plan == "phases":
        losses_SxJ[300:] += 1
    assert spikes_of(losses_SxJ, 256 * rows_SxJ) == []
    losses_SxJ[[120, 280, 440]] += 8
    assert spikes_of(losses_SxJ, 256 * rows_SxJ) == [120, 280, 440]


def test_sums_per_objective_do_not_use_matrix_products(micro_step):
    """Accelerators compute matrix products in bfloat16 or TF32."""
    state = jax.eval_shape(micro_step.init)
    program = str(jax.make_jaxpr(micro_step.step)(state, micro_step.batch()))
    assert " = dot_general[" in program
    assert f":f32[{len(micro_step.names)}] = dot_general[" not in program


def test_spike_warning_names_the_step(micro, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dualsm.training.step_metrics.SPIKE", -1000.0)  # every loss is a spike ...
    monkeypatch.setattr("dualsm.training.step_metrics.SPIKE_AFTER", 9)  # ... from step 10 on
    micro.mesh.data = -1
    assert train(micro, tmp_path / "run")
    reported = [line for line in capsys.readouterr().err.splitlines() if "spike" in line]
    assert [line.split(":")[1].strip() for line in reported] == ["step 10", "step 11", "step 12"]
