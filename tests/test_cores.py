"""Small models take a CPU's cores for devices, and work in parts that fit their caches."""

from types import SimpleNamespace

import jax
import pytest

from dualsm.devices import chips as hardware
from dualsm.devices import cores, sharding
from dualsm.process import cli
from dualsm.process.errors import UserError
from tests.conftest import XLA_FLAGS, run_command
from tests.micro import micro_config


@pytest.fixture
def small(monkeypatch):
    """A config of 16 rows of 256 tokens, on a machine of 6 cores where JAX was told nothing."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(cores, "_cores", lambda: 6)
    config = micro_config()
    config.batch_size, config.seq_len, config.model.vocab_size, config.mesh.data = 16, 256, 512, -1
    return config


def test_small_models_take_a_device_a_core(small):
    assert cores.devices(small) == 4  # which 16 rows can be shared by
    small.batch_size = 18
    assert cores.devices(small) == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"model.d_model": 1024},
        {"model.vocab_size": 65536},
        {"seq_len": 32},  # 512 tokens a step: enough for one core only
        {"mesh.fsdp": 2},
        {"mesh.data": 1, "mesh.fsdp": -1},
    ],
    ids=str,
)
def test_others_take_one(small, changes):
    small.update_from_flattened_dict(changes)
    assert cores.devices(small) == 1


def test_what_xla_was_told_stays(small, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"{XLA_FLAGS}3")
    assert cores.devices(small) == 0


def test_the_vocabulary_is_the_corpus_s(small, corpus_path):
    small.model.vocab_size, small.data.path = 0, ""
    with pytest.raises(UserError, match="data.path"):
        cores.devices(small)
    small.data.path = str(corpus_path)
    assert cores.devices(small) == 4


@pytest.mark.parametrize("told", ["", "3"])
def test_training_takes_them(told, corpus_path, tmp_path):
    flags = ("--config.mesh.data=-1", "--config.seq_len=256", "--config.batch_size=12", "--config.steps=1")
    env = {"XLA_FLAGS": XLA_FLAGS.split()[0], "JAX_NUM_CPU_DEVICES": told} if told else {"XLA_FLAGS": ""}
    config = f"--config=tests/micro.py:{corpus_path}"
    done = run_command("dualsm.train", config, f"--workdir={tmp_path}", *flags, env=env)
    assert done.returncode == 0, done.stderr
    expected = told or max(n for n in (1, 2, 3, 4, 6) if n <= cores._cores())
    assert f"parameters on {expected} x cpu" in done.stdout


@pytest.mark.parametrize(
    ("axis", "size", "gradient_accumulation_steps", "expected"),
    [("data", 4, 1, 8), ("data", 4, 2, 2), ("data", 1, 1, 1), ("fsdp", 4, 1, 1)],
)
def test_parts_fit_a_core_s_cache(axis, size, gradient_accumulation_steps, expected):
    """Where devices hold copies, and nothing else was asked for."""
    config = micro_config()
    config.mesh.update(dict.fromkeys(config.mesh, 1) | {axis: size})
    config.batch_size, config.seq_len, config.gradient_accumulation_steps = (
        64,
        256,
        gradient_accumulation_steps,
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:size])
    assert sharding.accumulation_steps(config, mesh) == expected


@pytest.mark.parametrize(
    ("platforms", "plugin", "file", "expected"),
    [
        ("cpu", True, "nvidia0", False),
        ("cuda,cpu", False, "", True),
        (None, True, "nvidia0", True),
        (None, True, "accel0", True),
        (None, True, "vfio/0", True),
        (None, True, "nvidiactl", False),  # the driver's, which is also there without a GPU
        (None, False, "nvidia0", False),
    ],
)
def test_freed_memory_is_kept_on_cpu_only(platforms, plugin, file, expected, monkeypatch, tmp_path):
    """No accelerator is here, so JAX's answers are replaced; the C library's setting cannot be read back."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / (file or "null")).touch()
    kept, least = [], jax.config.jax_persistent_cache_min_compile_time_secs
    config = SimpleNamespace(config=SimpleNamespace(jax_platforms=platforms))
    monkeypatch.setattr(hardware, "jax", config)
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda _: plugin or None)
    found = hardware.may_use_accelerator(tmp_path)
    assert found == expected
    monkeypatch.setattr(hardware, "may_use_accelerator", lambda: found)
    monkeypatch.setattr(cli, "keep_freed_memory", lambda **options: kept.append(options))
    cli.set_up_jax()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    assert len(kept) == (not expected)


def test_a_container_s_quota_limits_the_cores(monkeypatch, tmp_path):
    for text, expected in (("150000 100000\n", 1.5), ("max 100000\n", 6), ("", 6)):
        (tmp_path / "cpu.max").write_text(text)
        monkeypatch.setattr(hardware, "QUOTA", tmp_path / "cpu.max")
        monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(6)))
        assert hardware.usable_cores() == expected
