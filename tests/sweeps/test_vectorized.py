"""Runs that train in one program have the results of runs that train alone."""

import numpy as np
import pytest

from dualsm.optimizers.schedules import learning_rate
from dualsm.process.errors import UserError
from dualsm.rundir.metrics import read_metrics
from dualsm.sweeps.vectorized import check_one_shape, train_together, wsd_schedule
from dualsm.training.loop import train
from dualsm.training.run_corpora import open_corpora
from dualsm.training.start import complete
from dualsm.training.valid_rows import valid_rows
from tests.micro import micro_config

pytestmark = pytest.mark.slow


def run_config(path, causal=0.5, masked=0.5, pair=0.0, **values):
    config = micro_config(path)
    config.mixture.prefix = 0.0
    config.mixture.causal, config.mixture.masked_diffusion, config.mixture.mir = causal, masked, pair
    config.valid.objectives, config.valid.every = "causal,masked_diffusion", 4
    config.mesh.data = -1
    config.ema.decay = 0.9
    config.log.every = 4
    for key, value in values.items():
        config[key] = value
    return complete(config, open_corpora(config))


@pytest.fixture(scope="module")
def configs(corpus):
    path = corpus.folder
    runs = {
        "mixture": run_config(path),
        "causal": run_config(path, 1.0, 0.0, seed=3, repetitions=2),
        "short": run_config(path, 0.25, 0.75, steps=4),
        "options": run_config(path),
    }
    runs["options"].optimizer.weight_decay, runs["options"].objectives.causal.weight = 1.0, 2.0
    return runs


@pytest.fixture(scope="module")
def results(configs, corpus):
    tokenizer = corpus.tokenizer()
    rows = valid_rows(corpus.documents("valid"), 32, 16, tokenizer.special, tokenizer.token_bytes())
    found = train_together(
        configs, tokenizer.special, {"valid": rows}, ["causal", "masked_diffusion"], 2, 4, "valid"
    )
    return {result["name"]: result for result in found}


@pytest.mark.parametrize("name", ["causal", "short", "options"])
def test_held_out_losses_equal_those_of_a_run_alone(configs, results, name, tmp_path):
    config = configs[name].copy_and_resolve_references()
    config.valid.parameters = "both"
    train(config, tmp_path)
    last = read_metrics(tmp_path)[-1]
    for objective in ("causal", "masked_diffusion"):
        for kind in ("loss", "bits_per_byte"):
            np.testing.assert_allclose(
                results[name][f"valid/{objective}/{kind}"], last[f"valid/{objective}/{kind}"], rtol=2e-5
            )
            np.testing.assert_allclose(
                results[name][f"ema/valid/{objective}/{kind}"],
                last[f"valid/ema/{objective}/{kind}"],
                rtol=2e-5,
            )
    assert results[name]["steps"] == config.steps and results[name]["skipped"] == 0


def test_the_curve_has_a_point_per_interval(results):
    assert [point[0] for point in results["mixture"]["curve"]] == [4, 8, 12]
    assert [point[0] for point in results["short"]["curve"]] == [4]
    assert np.isfinite(results["mixture"]["curve"]).all()


def test_runs_of_a_pair_equal_a_run_alone(corpus, tmp_path):
    config = run_config(corpus.folder, 0.0, 0.0, 1.0)
    tokenizer = corpus.tokenizer()
    rows = valid_rows(corpus.documents("valid"), 32, 16, tokenizer.special, tokenizer.token_bytes())
    found = list(train_together({"mir": config}, tokenizer.special, {"valid": rows}, ["causal"], 1, 4))
    train(config, tmp_path)
    np.testing.assert_allclose(
        found[0]["valid/causal/loss"], read_metrics(tmp_path)[-1]["valid/causal/loss"], rtol=2e-5
    )


def test_the_curve_has_no_train_loss_without_an_update(corpus):
    """The first update makes the weights overflow, and all later ones are skipped."""
    config = run_config(corpus.folder, 1.0, 0.0, steps=8)
    config.optimizer.learning_rate = 1e30
    tokenizer = corpus.tokenizer()
    rows = valid_rows(corpus.documents("valid"), 32, 16, tokenizer.special, tokenizer.token_bytes())
    [found] = train_together({"run": config}, tokenizer.special, {"valid": rows}, ["causal"], 1, 4)
    (first, train_loss), (second, no_loss) = found["curve"]
    assert (first, second, found["skipped"]) == (4, 8, 7)
    assert 5 < train_loss < 8 and np.isnan(no_loss)


def test_schedule_equals_that_of_a_run(corpus):
    config = run_config(corpus.folder)
    for steps in (1, 7, 12, 100):
        expected, found = learning_rate(config.optimizer, steps), wsd_schedule(config.optimizer, steps)
        for step in range(steps):
            np.testing.assert_allclose(found(step), expected(step), rtol=1e-6)


def test_runs_of_other_shapes_are_rejected(corpus):
    one, other = run_config(corpus.folder), run_config(corpus.folder)
    other.model.d_ff = 96
    with pytest.raises(UserError, match="model.d_ff: 64 -> 96"):
        check_one_shape({"one": one, "other": other}, 4)
    with pytest.raises(UserError, match="config.steps=12 must be a multiple of 5"):
        check_one_shape({"one": one}, 5)
