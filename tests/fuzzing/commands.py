"""Runs commands as processes, each with one damaged input file."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Command(NamedTuple):
    """A command line, and the file to damage; `{it}` is a copy of the folder that `make_targets` filled.

    Attributes:
      arguments: arguments of `python -m`.
      file: path in the folder.
    """

    arguments: str
    file: str


COMMANDS = {
    "prepare": Command("dualsm.prepare --input={it}/documents.jsonl --output={it}/new --vocab_size=384",
                       "documents.jsonl"),
    "train": Command("dualsm.train --config={it}/recipe.py --workdir={it}/new --config.data.path={it}/corpus",
                     "corpus/manifest.json"),
    "evaluate": Command("dualsm.evaluate --workdir={it}/run --tasks=blimp --task_data={it}",
                        "blimp.jsonl"),
    "sample": Command("dualsm.sample --workdir={it}/run --prompt=a", "run/config.json"),
    "sweep": Command("dualsm.sweep --config={it}/recipe.py --workdir={it}/new", "recipe.py"),
    "recommend": Command("dualsm.recommend --unique_tokens=1e6 --budget=1e7 --sweep={it}/table.csv",
                         "table.csv"),
    "convert": Command("dualsm.convert import --format=reference --weights={it}/model.safetensors "
                       "--workdir={it}/new --tokenizer={it}/corpus/tokenizer.model", "model.safetensors"),
    "compile": Command("dualsm.compile --config={it}/recipe.py --topology=v5e:2x2", "recipe.py"),
}  # fmt: skip


def run_damaged(name: str, whole: Path, seed: int) -> str:
    """Truncates or overwrites an input file of a command, and runs the command.

    Args:
      name: name of the command.
      whole: folder that `make_targets` filled.
      seed: seed of the damage.

    Returns:
      The error line.

    Raises:
      AssertionError: if the command does not end with one error line and status 2, or leaves files behind.
    """
    command, rng = COMMANDS[name], random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "it"
        shutil.copytree(whole, folder)
        path = folder / command.file
        content = path.read_bytes() if path.exists() else b""
        half = content[: rng.randrange(len(content) // 2 + 1)]
        path.write_bytes(
            rng.choice([half + rng.randbytes(100), rng.randbytes(100), b"{" + half, b"\0" * 100])
        )
        there = _names(folder)
        done = subprocess.run(
            [sys.executable, "-m", *command.arguments.format(it=folder).split()],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        )
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2, (name, seed, done.stdout[-2000:], done.stderr[-2000:])
        assert len(lines) == 1 and "Traceback" not in done.stderr, (name, seed, done.stderr[-2000:])
        left = _names(folder)
        assert left == there, (name, seed, left - there)
        return lines[0]


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"__pycache__"}
