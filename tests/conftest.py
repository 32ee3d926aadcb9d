"""Shared fixtures: eight simulated devices, a small corpus of real text, a micro config."""

import json
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

# Disable optimizations: most of the time of the tests is compilation, and no test measures speed. XLA rejects
# unknown flags; newer versions do not have the second one, which makes compilation three times faster.
FAST_COMPILATION = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
XLA_FLAGS = f"{FAST_COMPILATION} --xla_force_host_platform_device_count="
os.environ["XLA_FLAGS"] = XLA_FLAGS + "8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).parents[1]
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402
import pytest  # noqa: E402

from dualsm.data.build import Recipe, build  # noqa: E402
from dualsm.data.corpus import Corpus  # noqa: E402
from tests.micro import micro_config  # noqa: E402

TRAINED_ON = ("email/*.py", "json/*.py", "logging/*.py")  # of the standard library, ~600 kB


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Returns real text: files of the standard library, split into documents at blank lines."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for pattern in TRAINED_ON:
        for path in sorted(root.glob(pattern)):
            blocks = path.read_text(encoding="utf-8").split("\n\n")
            texts += [block for block in blocks if block.strip()]
    return texts


@pytest.fixture(scope="session")
def jsonl(documents, tmp_path_factory) -> Path:
    """Returns a file of the documents as JSON lines."""
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture(scope="session")
def corpus_path(jsonl, tmp_path_factory) -> Path:
    """Returns the path of a corpus of real text with 512 ids."""
    path = tmp_path_factory.mktemp("corpus") / "corpus"
    build(Recipe(input=str(jsonl), vocab_size=512, valid_fraction=0.05), str(path), workers=1, quiet=True)
    return path


@pytest.fixture(scope="session")
def other_corpus_path(corpus_path, tmp_path_factory) -> Path:
    """Returns the path of a corpus of other text with the tokenizer of `corpus_path`."""
    path = tmp_path_factory.mktemp("other")
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.glob("unittest/*.py")):
        (path / f"{file.stem}.txt").write_text(file.read_text(encoding="utf-8"))
    recipe = Recipe(
        input=str(path / "*.txt"), tokenizer=str(corpus_path / "tokenizer.model"), valid_fraction=0.1
    )
    build(recipe, str(path / "corpus"), workers=1, quiet=True)
    return path / "corpus"


@pytest.fixture(scope="session")
def corpus(corpus_path) -> Corpus:
    return Corpus(str(corpus_path))


@pytest.fixture
def micro(corpus_path):
    """Returns `micro_config` with the session's corpus."""
    return micro_config(corpus_path)


@pytest.fixture(autouse=True)
def _no_leaked_mesh():
    yield
    assert jax.sharding.get_abstract_mesh().empty, "a test left a mesh behind"


@pytest.fixture(autouse=True, scope="module")
def _release_programs():
    """Releases the compiled programs of a test module, which take up to 9,000 memory mappings. Linux allows
    65,530 per process by default; at the limit, XLA's compiler ends with a segmentation fault."""
    yield
    jax.clear_caches()


def run_command(*arguments: str, devices: int = 1, timeout: float = 300, env: dict | None = None, **options):
    """Runs `python -m dualsm.NAME ...` or a script, with the environment variables `env`.

    Returns:
      The finished process.
    """
    by_name = [] if arguments[0].endswith(".py") else ["-m"]
    return subprocess.run(
        [sys.executable, *by_name, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=command_env(devices) | (env or {}),
        **options,
    )


def command_env(devices: int = 1) -> dict[str, str]:
    """Returns the environment of a command with a number of simulated devices."""
    return os.environ | {
        "XLA_FLAGS": f"{XLA_FLAGS}{devices}",
        "PYTHONPATH": str(ROOT),
    }
