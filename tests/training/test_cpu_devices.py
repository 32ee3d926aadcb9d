"""Small models use several CPU devices, and accumulate gradients so that activations fit in the cache."""

import jax
import pytest

from dualsm.devices import chips, sharding
from dualsm.process import cli, memory
from dualsm.process.errors import UserError
from dualsm.training import cpu_devices
from tests.conftest import FAST_COMPILATION, XLA_FLAGS, run_command
from tests.micro import micro_config

pytestmark = pytest.mark.slow


@pytest.fixture
def small(monkeypatch):
    """A batch of 16 sequences of 256 tokens, on 6 cores; the number of CPU devices is not set."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(cpu_devices, "_whole_cores", lambda: 6)
    config = micro_config()
    config.batch_size, config.seq_len, config.model.vocab_size, config.mesh.data = 16, 256, 512, -1
    return config


def test_small_models_use_up_to_one_device_per_core(small):
    assert cpu_devices.cpu_devices(small) == 4  # 6 and 5 do not divide 16
    small.batch_size = 18
    assert cpu_devices.cpu_devices(small) == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"model.d_model": 1024},
        {"model.vocab_size": 65536},
        {"seq_len": 32},  # 512 tokens per step are enough for one core only
        {"mesh.fsdp": 2},
        {"mesh.data": 1, "mesh.fsdp": -1},
    ],
    ids=str,
)
def test_other_models_use_one_device(small, changes):
    small.update_from_flattened_dict(changes)
    assert cpu_devices.cpu_devices(small) == 1


def test_xla_flags_take_precedence(small, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"{XLA_FLAGS}3")
    assert cpu_devices.cpu_devices(small) == 0


def test_vocabulary_size_is_read_from_the_corpus(small, corpus_path):
    small.model.vocab_size, small.data.path = 0, ""
    with pytest.raises(UserError, match="config.data.path: no corpus at ''"):
        cpu_devices.cpu_devices(small)
    small.data.path = str(corpus_path)
    assert cpu_devices.cpu_devices(small) == 4


@pytest.mark.parametrize("preset", ["", "3"])
def test_training_uses_the_cpu_devices(preset, corpus_path, tmp_path):
    flags = ("--config.mesh.data=-1", "--config.seq_len=256", "--config.batch_size=12", "--config.steps=1")
    env = {"XLA_FLAGS": FAST_COMPILATION, "JAX_NUM_CPU_DEVICES": preset} if preset else {"XLA_FLAGS": ""}
    config = f"--config=tests/micro.py:{corpus_path}"
    done = run_command("dualsm.train", config, f"--workdir={tmp_path}", *flags, env=env)
    assert done.returncode == 0, done.stderr
    expected = preset or max(n for n in (1, 2, 3, 4, 6) if n <= cpu_devices._whole_cores())
    assert f"parameters on {expected} x cpu" in done.stdout


@pytest.mark.parametrize(
    ("axis", "size", "gradient_accumulation_steps", "expected"),
    [("data", 4, 1, 8), ("data", 4, 2, 2), ("data", 1, 1, 1), ("fsdp", 4, 1, 1)],
)
def test_accumulation_steps_fit_the_cache_of_a_core(axis, size, gradient_accumulation_steps, expected):
    """Applies only if parameters are replicated and no accumulation is configured."""
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
        (None, True, "nvidiactl", False),  # belongs to the driver and also exists without a GPU
        (None, False, "nvidia0", False),
    ],
)
def test_freed_memory_is_kept_on_cpu_only(platforms, plugin, file, expected, monkeypatch, tmp_path):
    """Replaces the plugin lookup and `mallopt`: there is no accelerator, and settings cannot be read back."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / (file or "null")).touch()
    kept, least = [], jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda _: plugin or None)
    found = memory.may_use_accelerator(platforms, tmp_path)
    assert found == expected
    monkeypatch.setattr(cli, "may_use_accelerator", lambda _: found)
    monkeypatch.setattr(cli, "keep_freed_memory", lambda **options: kept.append(options))
    cli.set_up_jax()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    assert len(kept) == (not expected)


def test_container_quota_limits_the_cores(monkeypatch, tmp_path):
    for text, expected in (("150000 100000\n", 1.5), ("max 100000\n", 6), ("", 6)):
        (tmp_path / "cpu.max").write_text(text)
        monkeypatch.setattr(chips, "QUOTA", tmp_path / "cpu.max")
        monkeypatch.setattr(chips.os, "sched_getaffinity", lambda _: set(range(6)))
        assert chips.usable_cores() == expected
