"""Commands as a user runs them: flags, user errors, exit statuses."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from absl import flags
from ml_collections import config_flags

from dualsm.config import default_config, load_config, save_config
from dualsm.data.corpus import Corpus
from dualsm.process import cli
from dualsm.process.errors import is_broken_stdout
from tests.conftest import ROOT, command_env, run_command


@pytest.fixture(scope="module")
def recipe(corpus_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "micro.py"
    path.write_text(
        "from dualsm.config import parse_arg, set_alpha\n"
        "from tests.micro import micro_config\n\n\n"
        "def get_config(arg=''):\n"
        f"    config = micro_config({str(corpus_path)!r})\n"
        "    args = parse_arg(arg, alpha=float, repetitions=int)\n"
        "    if 'alpha' in args:\n"
        "        set_alpha(config, args['alpha'])\n"
        "    config.repetitions = args.get('repetitions', 1)\n"
        "    return config\n"
    )
    return path


def assert_one_line(process, *expected: str) -> None:
    assert process.returncode != 0
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    for text in expected:
        assert text in lines[0], lines[0]


BAD_CONFIGS = {
    "mixture": (["--config.mixture.causal=0.4"], ["config.mixture", "0.9"]),
    "unknown key": (["--config.model.widht=64"], ["unknown config key", "widht"]),
    "unknown node": (
        ["--config.modell.layers=3"],
        ["unknown config key", "'modell'", "dualsm/config_keys.py"],
    ),
    "wrong type": (["--config.steps=many"], ["config.steps", "many"]),
    "rows and gradient_accumulation_steps": (
        ["--config.gradient_accumulation_steps=3"],
        ["config.gradient_accumulation_steps=3", "config.batch_size=8"],
    ),
    "heads": (["--config.model.num_heads=5"], ["config.model.num_heads=5", "config.model.d_model=32"]),
    "odd heads": (["--config.model.num_heads=32"], ["config.model.num_heads=32", "even width"]),
    "vocab_size": (["--config.model.vocab_size=1024"], ["config.model.vocab_size=1024", "512"]),
    "data": (["--config.repetitions=1", "--config.steps=100000"], ["training tokens", "25,600,000 unique"]),
    "no corpus": (["--config.data.path=nowhere"], ["nowhere", "dualsm.prepare"]),
    "backend": (["--config.model.attention=telepathy"], ["config.model.attention", "telepathy"]),
    "schedule": (
        ["--config.optimizer.schedule.warmup_steps=11"],
        ["config.optimizer.schedule", "config.steps=12"],
    ),
    "infinite": (
        ["--config.optimizer.schedule.name=infinite"],
        ["final_fraction=0.0", "constant_fraction=0.5"],
    ),
    "zero steps": (["--config.steps=0"], ["config.steps=0", "from 1 to 10000000"]),
    "mesh": (["--config.mesh.data=3"], ["data=3", "devices"]),
    "valid objective": (["--config.valid.objectives=causal,nothing"], ["config.valid.objectives", "nothing"]),
    "wandb": (["--config.log.wandb=project"], ["wandb", "pip install"]),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_invalid_configs_are_user_errors(case, recipe, tmp_path):
    if case == "wandb" and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    overrides, expected = BAD_CONFIGS[case]
    process = run_command("dualsm.train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", *overrides)
    assert_one_line(process, *expected)
    assert not (tmp_path / "run").exists()


def test_batch_sizes_that_devices_do_not_divide(recipe, tmp_path):
    process = run_command(
        "dualsm.train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", "--config.mesh.data=8",
        "--config.batch_size=12", devices=8,
    )  # fmt: skip
    assert_one_line(process, "8 devices", "config.batch_size=12")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config=nowhere.py", "--workdir=x"], "nowhere.py"),
        (["--workdir=x"], "--config"),
        (["--config={recipe}"], "--workdir"),
        (["--config={recipe}:beta=1", "--workdir=x"], "beta"),
        (["--config={recipe}:alpha=half", "--workdir=x"], "half"),
        (["--config={recipe}", "--workdir=x", "--bogus"], "bogus"),
        (["--config={recipe}", "--workdir=x", "stray"], "stray"),
        (["--config=setup.cfg", "--workdir=x"], "setup.cfg"),
    ],
)
def test_invalid_command_lines_are_user_errors(arguments, expected, recipe):
    arguments = [argument.format(recipe=recipe) for argument in arguments]
    assert_one_line(run_command("dualsm.train", *arguments), expected)


def test_config_arguments_and_overrides_reach_the_run(recipe, tmp_path):
    process = run_command(
        "dualsm.train", f"--config={recipe}:alpha=0.75,repetitions=4", f"--workdir={tmp_path / 'run'}",
        "--config.steps=2", "--config.valid.num_sequences=4",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    config = load_config((tmp_path / "run" / "config.json").read_text())
    assert (config.mixture.causal, config.mixture.masked_diffusion, config.repetitions) == (0.75, 0.25, 4)
    assert config.steps == 2


def test_workdir_of_another_config_is_rejected(recipe, tmp_path):
    arguments = ["dualsm.train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", "--config.steps=2"]
    assert run_command(*arguments).returncode == 0
    process = run_command(*arguments, "--config.optimizer.learning_rate=0.5")
    assert_one_line(process, "optimizer.learning_rate: 0.007 -> 0.5", "--workdir")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    process = run_command(arguments[0], arguments[1], f"--workdir={tmp_path / 'other'}")
    assert_one_line(process, "is not empty")


def test_corpus_of_another_tokenizer_is_rejected(recipe, corpus_path, jsonl, tmp_path):
    arguments = ["dualsm.train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", "--config.steps=2"]
    assert run_command(*arguments).returncode == 0
    process = run_command(
        "dualsm.prepare", f"--input={jsonl}", f"--output={tmp_path / 'corpus'}", "--vocab_size=512",
        "--tokenizer_bytes=50000", "--valid_fraction=0.05",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    process = run_command(*arguments, f"--config.data.path={tmp_path / 'corpus'}")
    assert_one_line(process, "another corpus", str(tmp_path / "corpus"))
    # A tokenizer that does not belong to the corpus is detected too.
    shutil.copytree(corpus_path, tmp_path / "mixed")
    shutil.copy(tmp_path / "corpus" / "tokenizer.model", tmp_path / "mixed")
    process = run_command("dualsm.train", f"--config={recipe}", f"--workdir={tmp_path / 'new'}",
                          f"--config.data.path={tmp_path / 'mixed'}")  # fmt: skip
    assert_one_line(process, "tokenizer")


@pytest.mark.parametrize("arguments", [[], ["--input=nowhere.jsonl", "--output=x", "--vocab_size=512"]])
def test_errors_of_prepare_are_one_line(arguments):
    assert_one_line(run_command("dualsm.prepare", *arguments))


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_help_lists_the_flags(command):
    process = run_command(f"dualsm.{command}", "--help")
    assert "--" in process.stdout
    assert "Traceback" not in process.stdout + process.stderr
    assert process.returncode == 0


def parsed(path, monkeypatch, *arguments: str) -> None:
    """Parses a command line with a config file in this process."""
    given = ["train", f"--config={path}", *arguments]
    fresh = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "recipe", flag_values=fresh)
    monkeypatch.setattr(flags, "FLAGS", fresh)
    monkeypatch.setattr("sys.argv", given)  # ml_collections reads overrides from here
    cli._parse_flags(given)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{}['depth']", "KeyError: depth"),
        ("config['modell']", "KeyError: 'modell'"),
        ("config.modell.layers = 3", "AttributeError: 'modell'"),
        ("config.steps = 'many'", "TypeError: Could not override field 'steps'"),
    ],
)
def test_errors_in_a_config_file_name_the_file(line, expected, tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from dualsm.config import default_config\n\n\n"
        f"def get_config():\n    config = default_config()\n    {line}\n    return config\n"
    )
    with pytest.raises(SystemExit) as ended:
        parsed(path, monkeypatch)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1
    assert expected in told and str(path) in told
    assert "command line" not in told


def test_a_config_file_that_exits_keeps_its_status(tmp_path, monkeypatch):
    """absl's `--help` leaves the parser in the same way."""
    path = tmp_path / "recipe.py"
    path.write_text("import sys\n\n\ndef get_config():\n    sys.exit(1)\n")
    with pytest.raises(SystemExit) as ended:
        parsed(path, monkeypatch)
    assert ended.value.code == 1


def test_out_of_memory_is_one_line(tmp_path):
    script = tmp_path / "huge.py"
    script.write_text(
        "import jax.numpy as jnp\nfrom dualsm.process import cli\n\n"
        "cli.run(lambda argv: print(jnp.zeros(2**44)))\n"
    )
    process = run_command(str(script))
    assert_one_line(
        process, "70368744177664 bytes", "config.per_device_batch_size", "config.batch_size",
        "config.model.remat", "config.mesh.fsdp",
    )  # fmt: skip
    assert process.returncode == 2


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_broken_pipe_on_stdout_ends_silently(arguments, unbuffered, tmp_path):
    script = tmp_path / "talk.py"
    script.write_text("from dualsm.process import cli\n\ncli.run(lambda argv: print('of much'))\n")
    reader, writer = os.pipe()
    os.close(reader)
    env = command_env() | {"PYTHONUNBUFFERED": unbuffered}
    process = subprocess.run(
        [sys.executable, str(script), *arguments], stdout=writer, stderr=subprocess.PIPE, env=env
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, b"")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "cp1252"])
def test_any_text_is_printed_in_any_encoding(encoding, tmp_path):
    script = tmp_path / "talk.py"
    script.write_text(
        "from dualsm.process import cli\nfrom dualsm.process.progress import say, warn\n\n"
        "text = '\\xb1 \\u2581 \\ud800'\ncli.run(lambda argv: (print(text), say(text), warn(text)))\n"
    )
    env = command_env() | {"PYTHONIOENCODING": encoding}
    process = subprocess.run([sys.executable, str(script)], capture_output=True, env=env)
    expected = "\xb1 \u2581 \ud800".encode(encoding, errors="backslashreplace")
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [expected] * 2
    assert process.stderr.splitlines() == [b"warning: " + expected]


def test_other_broken_pipes_are_errors():
    assert not is_broken_stdout(BrokenPipeError())


def test_missing_platform_is_a_user_error(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    process = run_command("dualsm.train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}")
    if importlib.util.find_spec("libtpu"):  # it logs its own attempt before
        process.stderr = process.stderr[process.stderr.index("error: Unable to initialize") :]
    assert_one_line(process, "tpu", "JAX_PLATFORMS")
    assert not (tmp_path / "run").exists()


def test_imports_do_not_start_a_backend():
    code = (
        "import sys, dualsm.train, dualsm.prepare, jax\n"
        "from jax._src import xla_bridge\n"
        "sys.exit(bool(xla_bridge._backends))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=command_env()).returncode == 0


def test_config_round_trips_through_json():
    config = default_config()
    assert load_config(save_config(config)).to_dict() == config.to_dict()


def test_only_leftover_errors_of_orbax_are_hidden():
    """Unraisable errors are printed, except those of Orbax next to an error that was reported."""
    shown = []
    hook = cli._ignore_leftovers(shown.append)

    def left(message: str, file: str | None):
        coroutine = SimpleNamespace(cr_code=SimpleNamespace(co_filename=file)) if file else None
        return SimpleNamespace(exc_value=Exception(message), object=coroutine)

    ours = [left("x", None), left("x", "/dualsm/loop.py")]
    for error in [*ours, left("x", "/orbax/read.py"), left("Event loop is closed", None)]:
        hook(error)
    assert shown == ours


def test_a_home_folder_is_expanded_in_every_path(tmp_path, jsonl, monkeypatch):
    """Shells leave the `~` of `--flag=~/folder` alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(jsonl, tmp_path / "d.jsonl")
    process = run_command("dualsm.prepare", "--input=~/d.jsonl", "--output=~/c", "--vocab_size=512",
                          "--tokenizer_bytes=50000", "--valid_fraction=0.05")  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "c" / "manifest.json").exists()
    assert Corpus("~/c").vocab_size == 512
    (tmp_path / "recipe.py").write_text("from tests.micro import micro_config as get_config\n")
    assert_one_line(run_command("dualsm.train", "--config=~/recipe.py:~/none", "--workdir=~/w"), "no corpus")
    assert_one_line(run_command("dualsm.sample", "--workdir=~/w"), f"{tmp_path}/w")
    names = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert names == {"d.jsonl", "c", "recipe.py"}


def test_every_flag_for_a_path_is_defined_as_one():
    modules = [*(ROOT / "dualsm").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    sources = [module.read_text() for module in modules]
    paths = {name for source in sources for name in re.findall(r'cli\.DEFINE_path\(\s*"(\w+)"', source)}
    strings = {name for source in sources for name in re.findall(r'flags\.DEFINE_string\(\s*"(\w+)"', source)}
    assert {"workdir", "output", "tokenizer", "task_data"} <= paths
    assert not paths & strings
