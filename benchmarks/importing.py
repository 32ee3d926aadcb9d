"""Measures the peak memory of `dualsm convert import` for random weights in the paper's format.

    python benchmarks/importing.py
    python benchmarks/importing.py --dtype=BF16

The import runs in a separate process. Its peak resident memory is compared with the size of the parameters
in float32. The memory of the framework is the peak of the same command for a tiny model. Another process
writes the weights, because Linux counts the memory of the process that starts a command as the command's.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import numpy as np
from absl import flags

from dualsm.config import default_config
from dualsm.data.tokenizer import RESERVED_IDS, SPECIAL_PIECES
from dualsm.exchange import reference_format
from dualsm.exchange.tensor_info import DTYPES
from dualsm.exchange.tokenizer_export import added_token
from dualsm.exchange.weight_files import write_safetensors
from dualsm.model.transformer import init_params
from dualsm.process import cli
from dualsm.process.progress import say, table

SHAPES = {
    # num_layers, d_model, num_heads, d_ff, vocab_size
    "tiny": (2, 64, 4, 172, 512),
    "470m": (24, 1024, 16, 3554, 51_200),
}

_DTYPE = flags.DEFINE_enum("dtype", "F32", [n for n in DTYPES if "F" in n], "type of the tensors in the file")
_WORKDIR = cli.DEFINE_path("workdir", "", "folder for files of 4 GB; default: a temporary folder")
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")


def write_model(folder: Path, shape: str, dtype: str) -> int:
    """Writes random weights and a tokenizer; returns the number of parameters."""
    model = default_config().model
    model.num_layers, model.d_model, model.num_heads, model.d_ff, model.vocab_size = SHAPES[shape]
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), params)
    metadata = {names[0]: str(model[key]) for key, names in reference_format.SETTINGS.items()}
    write_safetensors(folder / "model.safetensors", reference_format.from_params(params), metadata, dtype)
    pieces = [*SPECIAL_PIECES.values(), *(f"<special_{i}>" for i in range(11))]
    pieces += [f"t{i}" for i in range(RESERVED_IDS, model.vocab_size)]
    content = {
        "added_tokens": [added_token(i, piece) for i, piece in enumerate(pieces[:RESERVED_IDS])],
        "model": {
            "type": "WordLevel", "vocab": {p: i for i, p in enumerate(pieces)}, "unk_token": "<unk>"
        },
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def measure(folder: Path) -> tuple[float, float]:
    """Imports the model in a new process; returns its peak resident memory in bytes, and the seconds."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "dualsm.convert", "import", "--format=reference",
            f"--weights={folder / 'model.safetensors'}", f"--workdir={folder / 'run'}",
        ]
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the import failed with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024, time.perf_counter() - start


def main(_: Sequence[str]) -> None:
    rows, peaks = [], {}
    for shape in SHAPES:
        with tempfile.TemporaryDirectory(dir=_WORKDIR.value or None) as name:
            folder = Path(name)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                parameters = pool.submit(write_model, folder, shape, _DTYPE.value).result()
            peaks[shape], seconds = measure(folder)
        rows.append([shape, f"{parameters:,}", f"{peaks[shape] / 1e6:,.0f}", f"{seconds:.1f}"])
    say(table(["model", "parameters", "peak resident MB", "seconds"], rows))
    ratio = (peaks["470m"] - peaks["tiny"]) / (4 * parameters)
    say(f"peak above the framework's: {ratio:.2f} x the parameters in float32")
    if _OUTPUT.value:
        content = {"bytes": peaks, "parameters": parameters, "ratio": ratio}
        Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
