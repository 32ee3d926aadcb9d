"""A run's config is read with care: older ones are completed, damaged ones refused."""

import json

import pytest

from dualsm.config import save_config
from dualsm.generation.generate import check_mode
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import TrainedRun
from dualsm.rundir.workdir import read_config


def test_keys_of_later_versions_get_their_defaults(micro, tmp_path):
    content = json.loads(save_config(micro))
    del content["model"]["head"], content["max_consecutive_skips"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_config(tmp_path).to_dict() == micro.to_dict()


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"steps": null}', '{"model": 3}', '{"widht": 3}', '{"steps": -1}']
)
def test_damaged_configs_are_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json is damaged"):
        read_config(tmp_path)


def test_masks_are_not_filled_in_by_an_unshifted_model(micro, tmp_path):
    run = TrainedRun(tmp_path, micro, None, 0, {}, None)
    modes = ("causal", "prefix", "masked", "monte_carlo", "diffusion")
    for mode in modes:
        check_mode(run, mode)
    micro.objectives.masked_diffusion.shifted = False
    for mode in modes[:2]:
        check_mode(run, mode)
    for mode in modes[2:]:
        with pytest.raises(UserError, match="shifted=False"):
            check_mode(run, mode)
    micro.mixture.causal, micro.mixture.masked_diffusion = 0.75, 0.0
    check_mode(run, "masked")  # never trained, so nothing was learned the other way


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match="no run at"):
        read_config(tmp_path)
