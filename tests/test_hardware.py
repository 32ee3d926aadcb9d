"""Peak FLOP/s of devices, for the MFU."""

import math
from types import SimpleNamespace

import jax
import pytest

from dualsm.devices import chips as hardware
from dualsm.devices.chips import CHIPS, Peak, listed_flops, peak_flops


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        # Not the chip whose name is a prefix.
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H20", None),
        ("NVIDIA A10G", None),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_chip_variants_have_their_own_peak(kind, flops):
    assert listed_flops(kind) == flops


def test_chips_to_compile_for_are_listed_by_the_name_that_they_report():
    for chip in CHIPS.values():
        assert chip.gpu is None or listed_flops(chip.gpu.name) == chip.flops


def test_only_cpu_devices_share_a_measured_peak(monkeypatch):
    """The measurement is replaced, because the test has no GPU."""
    monkeypatch.setattr(hardware, "measured_flops", lambda *_, **__: 1e12)
    monkeypatch.setattr(hardware, "_host_cores", lambda: ("host", [0, 1, 2, 3], math.inf))
    assert peak_flops(SimpleNamespace(device_kind="NVIDIA Unlisted", platform="gpu")) == 1e12
    assert jax.local_device_count() == 8
    assert peak_flops(jax.devices()[0]) == 4e12 / 8


@pytest.mark.parametrize(
    ("processes", "cores"),
    [
        ([("a", [0, 1, 2, 3], math.inf)], 4),
        ([("a", [0, 1, 2, 3], math.inf)] * 2, 4),  # two processes that share four cores
        ([("a", [0, 1], math.inf), ("a", [2, 3], math.inf)], 4),
        ([("a", [0, 1], math.inf), ("b", [0, 1], math.inf)], 4),
        ([("a", [0, 1, 2, 3], 1.5)] * 2 + [("b", [5], math.inf)], 2.5),
    ],
)
def test_cores_of_a_host_count_once(processes, cores):
    assert hardware.shared_cores(processes) == cores


def test_mfu_with_a_measured_peak_is_at_most_1():
    peak = Peak(jax.devices()[0], jax.local_device_count())
    assert 0 < peak.utilization(1e6) < 0.1
    assert peak.utilization(1e18) == 1
    assert peak.utilization(1e17) == pytest.approx(0.1)


def test_listed_peaks_do_not_change():
    peak = Peak(SimpleNamespace(device_kind="NVIDIA H200", platform="gpu"), 2)
    assert peak.utilization(4 * 989e12) == peak.utilization(4 * 989e12) == 2
