"""Compile reports for absent devices: FLOPs, memory, collectives, roofline."""

import importlib.util
import json
import math

import jax
import numpy as np
import pytest

from dualsm.aot.absent import absent_devices
from dualsm.aot.hlo import Work, analyze
from dualsm.aot.report import (
    MEMORY_FRACTION,
    as_text,
    block_fraction,
    device_bytes,
    make_report,
    special_ids,
    usable_memory,
)
from dualsm.aot.roofline import estimate, interconnect_bandwidth
from dualsm.devices import sharding
from dualsm.devices.chips import CHIPS
from dualsm.model.flops import train_flops
from dualsm.objectives.example import SpecialIds
from dualsm.optimizers.optimizer import make_optimizer
from dualsm.process.errors import UserError
from dualsm.training.program import activation_bytes, attended_share, batch_shapes, compile_train_step
from tests.conftest import run_command
from tests.micro import micro_config


def config_on(devices: int, **mesh):
    """Returns the micro config and a mesh of some of the simulated devices."""
    config = micro_config()
    config.model.vocab_size = 128
    config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1} | mesh)
    return config, sharding.make_mesh(config.mesh, jax.devices()[:devices])


def compiled_step(config, mesh):
    program = compile_train_step(config, SpecialIds(), mesh)
    with jax.set_mesh(mesh):
        return program, program.step.lower(program.abstract_state, batch_shapes(config, mesh)).compile()


def test_flops_formula_equals_the_flops_of_the_compiled_step():
    """Without remat, and with AdamW, which has no matrix products. XLA attention computes all scores."""
    config, mesh = config_on(1)
    config.model.remat, config.optimizer.name = "none", "adamw"
    _, compiled = compiled_step(config, mesh)
    expected = config.batch_size * train_flops(config.model, config.seq_len, attended=1.0)
    assert analyze(compiled.as_text(), 1).flops == pytest.approx(expected, rel=0.01)


def test_attended_share():
    config, _ = config_on(1)
    config.mixture.update({"causal": 1.0, "prefix": 0.0, "masked_diffusion": 0.0})
    assert attended_share(config, SpecialIds()) == pytest.approx(33 / 64)
    config.mixture.update({"causal": 0.5, "masked_diffusion": 0.5})
    assert attended_share(config, SpecialIds()) == pytest.approx(33 / 128 + 0.5)
    # With blocks of a quarter of the row, causal rows compute 1, 2, 3 and 4 of 4 blocks.
    assert attended_share(config, SpecialIds(), config.seq_len // 4) == pytest.approx(10 / 32 + 0.5)
    config.mixture.update({"causal": 0.0, "masked_diffusion": 0.0, "block_diffusion": 1.0})
    config.objectives.block_diffusion.block = config.seq_len // 4
    assert attended_share(config, SpecialIds()) == pytest.approx(10 / 16)


def test_full_remat_saves_one_array_per_layer():
    config, _ = config_on(1)
    sizes = {}
    for remat in ("full", "none"):
        for layers in (2, 4):
            config.model.remat, config.model.num_layers = remat, layers
            sizes[remat, layers] = activation_bytes(config, SpecialIds(), rows=4)
    width = 4 * config.seq_len * config.model.d_model * 4
    assert sizes["full", 4] - sizes["full", 2] == 2 * width
    assert sizes["none", 4] - sizes["none", 2] > 10 * 2 * width


def newton_schulz(devices: int, layers: int, **mesh) -> tuple[Work, dict]:
    """Returns the work per device of Muon's update of a stack of matrices, and the updates."""
    config, mesh = config_on(devices, **mesh)
    optimizer = make_optimizer(config.optimizer, lambda _: 1e-2, config.steps)
    shape = (layers, 32, 64)
    grads = {"blocks": {"mlp": {"gate": {"kernel": np.random.default_rng(0).normal(size=shape).astype("f")}}}}
    layout = sharding.tree_shardings(mesh, grads)
    with jax.set_mesh(mesh):
        grads = jax.device_put(grads, layout)
        state = jax.jit(optimizer.init)(grads)
        update = jax.jit(lambda g, s: optimizer.update(g, s, g)[0], out_shardings=layout)
        compiled = update.lower(grads, state).compile()
        return analyze(compiled.as_text(), devices), jax.tree.map(np.asarray, compiled(grads, state))


@pytest.mark.parametrize(
    ("layers", "mesh"), [(8, {"fsdp": 8, "data": 1}), (6, {"fsdp": 4, "tensor": 2, "data": 1})]
)
def test_muon_shards_the_layers(layers, mesh):
    """Each device updates its share of the layers without gathering all of them; the result is unchanged."""
    whole, expected = newton_schulz(1, layers)
    part, updates = newton_schulz(8, layers, **mesh)
    assert part.flops == math.ceil(layers / mesh["fsdp"]) / layers * whole.flops > 0
    stack = layers * 32 * 64 * 4
    assert part.collective_bytes.get("all-gather", 0) < stack
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_report_divides_the_parameters_by_the_devices():
    (_, two), (config, eight) = (config_on(n, data=1, fsdp=n) for n in (2, 8))
    config.batch_size, config.optimizer.name = 16, "adamw"
    program, compiled = compiled_step(config, eight)
    work = analyze(compiled.as_text(), 8)
    report = make_report(config, "v5e:2x4", eight, program, compiled.memory_analysis(), work)
    at_two = compile_train_step(config, SpecialIds(), two).abstract_state
    for part, tree in (("parameters", at_two.params), ("optimizer", at_two.opt_state)):
        assert report["memory"][part] == pytest.approx(device_bytes(tree) / 4, rel=0.1)  # except vectors
    assert report["per_device_batch_size"] == 2
    assert report["flops"]["compiled"] * 8 > report["flops"]["model_all_devices"]
    text = as_text(report)
    assert "2 sequences per chip and accumulation step" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("matrix products"))
    assert float(row[2]) == pytest.approx(report["flops"]["compiled"] / 1e12, rel=0.01)  # a small number
    assert float(row[4]) == pytest.approx(report["roofline"]["compute_seconds"], rel=0.01)


def test_objectives_that_draw_random_tokens_can_be_reported():
    config, _ = config_on(1)
    config.mixture.update({"causal": 0.5, "prefix": 0.0, "masked_diffusion": 0.0, "masked": 0.5})
    assert special_ids(config).vocab_size == 128
    assert block_fraction(config, "tpu") == pytest.approx(33 / 128 + 0.5)


@pytest.mark.parametrize(
    ("chip", "settings", "share"),
    [
        ("v5e", {}, 1),
        ("h200", {}, 0.75),
        ("h200", {"XLA_CLIENT_MEM_FRACTION": "0.9"}, 0.9),
        ("h200", {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, 0.5),
        ("h200", {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, 1),
        ("v5e", {"XLA_CLIENT_MEM_FRACTION": "0.9"}, 1),
    ],
)
def test_jax_uses_a_fraction_of_gpu_memory(chip, settings, share, monkeypatch):
    for key in (*MEMORY_FRACTION, "XLA_PYTHON_CLIENT_ALLOCATOR"):
        monkeypatch.delenv(key, raising=False)
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    assert usable_memory(chip) == pytest.approx(share * CHIPS[chip].hbm_bytes)


def test_invalid_memory_fraction_is_rejected(monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(UserError, match="XLA_CLIENT_MEM_FRACTION.*'most' must be a number"):
        usable_memory("a100")


@pytest.mark.parametrize(
    ("rows", "per_device_batch_size", "gradient_accumulation_steps", "expected"),
    [(64, 0, 4, 4), (64, 4, 1, 2), (64, 3, 1, 4), (64, 100, 1, 1), (24, 2, 1, 3)],
)
def test_per_device_batch_size_determines_accumulation_steps(
    rows, per_device_batch_size, gradient_accumulation_steps, expected
):
    config, mesh = config_on(8) if rows == 64 else config_on(4)
    config.batch_size, config.per_device_batch_size, config.gradient_accumulation_steps = (
        rows,
        per_device_batch_size,
        gradient_accumulation_steps,
    )
    assert sharding.accumulation_steps(config, mesh) == expected


def test_batch_sizes_that_cannot_be_divided():
    config, mesh = config_on(8)
    for rows, gradient_accumulation_steps, message in (
        (12, 1, "must be a multiple of the 8 devices"),
        (16, 4, "8 devices cannot share"),
    ):
        config.batch_size, config.gradient_accumulation_steps = rows, gradient_accumulation_steps
        with pytest.raises(UserError, match=message):
            sharding.accumulation_steps(config, mesh)


def test_roofline():
    """Work that takes one second of each resource at peak."""
    assert interconnect_bandwidth("v5e:16x16") == 4 * 45e9
    assert interconnect_bandwidth("v5e:4x4") == 2 * 45e9
    assert interconnect_bandwidth("v5p:4x4x1") == 4 * 90e9
    assert interconnect_bandwidth("h200:8") == 450e9
    assert interconnect_bandwidth("h200:1") == 0
    chip = CHIPS["v5p"]
    work = Work(chip.flops, chip.hbm_bandwidth, {"all-gather": 6 * 90e9}, {"all-gather": 1})
    found = estimate("v5p:4x4x4", 64, work, model_flops=0.5 * 64 * chip.flops)
    assert found["step_seconds_overlapped"] == pytest.approx(1)
    assert found["step_seconds_serial"] == pytest.approx(3)
    assert found["mfu_overlapped"] == pytest.approx(0.5)
    assert found["mfu_serial"] == pytest.approx(0.5 / 3)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu (extra `tpu`, 700 MB) is not installed"
)


needs_cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="JAX's CUDA plugin (extra `cuda`, 3 GB) is not installed",
)


MICRO = ("--config=tests/micro.py", "--config.model.vocab_size=128", "--config.mesh.fsdp=-1")


@pytest.mark.extras
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v4:2x2x1"])  # a v4 chip has two cores, which are one device
def test_command_compiles_for_absent_tpus(topology, tmp_path):
    output = tmp_path / "report.json"
    done = run_command("dualsm.compile", *MICRO, f"--topology={topology}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["devices"] == 4
    assert report["mesh"]["fsdp"] == 4
    assert 0 < report["memory"]["total"] < report["memory"]["chip"]
    assert report["memory"]["parameters"] < report["parameters"] * 4 / 3
    assert report["collectives"]
    assert report["flops"]["compiled"] * 4 > report["flops"]["model_all_devices"]


@pytest.mark.extras
@needs_libtpu
def test_attention_scores_stay_out_of_main_memory(tmp_path):
    def has_scores(backend: str) -> bool:
        program = tmp_path / backend
        done = run_command(
            "dualsm.compile", *MICRO, "--topology=v5e:2x2", "--config.seq_len=256",
            f"--config.model.attention={backend}", f"--hlo={program}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return "256,256]" in program.read_text()

    assert has_scores("xla")
    assert not has_scores("splash")


@needs_cuda
def test_command_compiles_for_absent_gpus(tmp_path):
    """The program contains the attention kernel and no array of scores."""
    output, program = tmp_path / "report.json", tmp_path / "program"
    done = run_command(
        "dualsm.compile", *MICRO, "--topology=h200:4", "--config.seq_len=256",
        "--config.model.attention=flash", f"--output={output}", f"--hlo={program}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report, text = json.loads(output.read_text()), program.read_text()
    assert report["devices"] == 4
    assert report["flops"]["compiled"] * 4 > report["flops"]["model_all_devices"]
    for kernel in ("flash_forward", "flash_backward_queries", "flash_backward_keys"):
        assert text.count(f'name = "{kernel}"') == 1  # no recomputation
    assert "256,256]" not in text


@pytest.mark.extras
@needs_libtpu
def test_invalid_topologies_are_rejected():
    done = run_command("dualsm.compile", *MICRO, "--topology=v5p:3x1x1")
    assert done.returncode == 2
    assert "error: --topology=v5p:3x1x1: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.extras
@needs_libtpu
def test_step_that_does_not_fit_is_an_error():
    done = run_command(
        "dualsm.compile", *MICRO, "--topology=v5e:2x2", "--config.model.d_model=16384",
        "--config.model.d_ff=65536", "--config.model.num_heads=128",
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: does not fit" in done.stderr


@pytest.mark.parametrize("topology", ["v5e", "v9:4x4", "4x4", "h200", "h200:2x4", "h200:0"])
def test_unknown_chips_are_rejected(topology):
    with pytest.raises(UserError, match=f"--topology={topology} must have the form CHIP:AxB"):
        absent_devices(topology)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")),
    reason="a compiler for absent devices is installed",
)
@pytest.mark.parametrize(("topology", "missing"), [("v5e:4x4", "tpu"), ("h200:1", "cuda")])
def test_missing_compiler_error_says_what_to_install(topology, missing):
    done = run_command("dualsm.compile", *MICRO, f"--topology={topology}")
    assert done.returncode == 2
    assert f"pip install 'dualsm[{missing}]'" in done.stderr
