"""Opening a run: configs of older versions, damaged configs, unsupported modes."""

import json

import pytest

from dualsm.config import save_config
from dualsm.generation.generate import check_mode
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import TrainedRun
from dualsm.rundir.workdir import read_config


def test_missing_keys_have_their_defaults(micro, tmp_path):
    content = json.loads(save_config(micro))
    del content["model"]["head"], content["max_consecutive_skips"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_config(tmp_path).to_dict() == micro.to_dict()


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"steps": null}', '{"model": 3}', '{"widht": 3}', '{"steps": -1}']
)
def test_damaged_configs_are_rejected(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json is damaged"):
        read_config(tmp_path)


def test_unshifted_models_are_rejected_for_masked_modes(micro, tmp_path):
    run = TrainedRun(tmp_path, micro, None, 0, {}, None)
    modes = ("causal", "prefix", "masked", "monte_carlo", "diffusion", "speculative")
    for mode in modes:
        check_mode(run, mode)
    micro.objectives.masked_diffusion.shifted = False
    for mode in modes[:2]:
        check_mode(run, mode)
    for mode in modes[2:]:
        with pytest.raises(UserError, match="shifted=False"):
            check_mode(run, mode)
    micro.mixture.causal, micro.mixture.masked_diffusion = 0.75, 0.0
    check_mode(run, "masked")  # the objective is not trained, so its option does not matter


def test_folder_without_a_run_is_rejected(tmp_path):
    with pytest.raises(UserError, match="no run at"):
        read_config(tmp_path)
