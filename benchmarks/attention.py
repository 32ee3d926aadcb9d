"""Checks and times implementations of attention, forward and backward, with sequences of all objectives.

    python benchmarks/attention.py --dtype=bfloat16 --rows=18       # on an accelerator
    JAX_PLATFORMS=cpu python benchmarks/attention.py

The reference is XLA attention on all queries of a sequence, which materializes the L x L scores. The other
implementations are XLA attention on chunks of queries, the kernel of the platform if there is one, and, on
NVIDIA GPUs, cuDNN attention with the key ranges as a mask. Each round times all implementations in turn;
ratios compare timings of the same round. A difference from the reference beyond rounding is an error.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dualsm.config import default_config
from dualsm.model import attention
from dualsm.objectives import mixture
from dualsm.objectives.example import Row, SpecialIds
from dualsm.objectives.pairs import bind_members, entry, members_of
from dualsm.objectives.registry import OBJECTIVES
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.progress import say, table

_ROWS = flags.DEFINE_integer("rows", 9, "batch size; the objectives alternate", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 2048, "sequence length", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 4, "number of heads", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 64, "head dimension", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "dtype of queries, keys and values")
_QUERIES = flags.DEFINE_multi_integer("queries", [128, 256, 512], "chunk sizes of XLA attention, in queries")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 7, "number of rounds; results are medians over the rounds", lower_bound=1
)
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")

PEER = "all queries"
CUDNN = "cuDNN with a mask"
VOCABULARY = 512  # the tokens do not affect attention


def key_ranges(rows: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Returns the key ranges, [B, L] each, for documents of various lengths and all objectives."""
    names, special = list(OBJECTIVES), SpecialIds(vocab_size=VOCABULARY)
    objectives = bind_members(members_of([entry(name, default_config()) for name in names]), special)
    random = np.random.default_rng(0)
    tokens_BxL1 = random.integers(16, VOCABULARY, (rows, length + 1)).astype(np.int32)
    starts_BxL1 = random.random((rows, length + 1)) < 4 / length  # about four documents per sequence
    documents_BxL1 = starts_BxL1.cumsum(1).astype(np.int32)
    stratum_B, strata_B = np.arange(rows), np.full(rows, rows)
    row = Row(tokens_BxL1, documents_BxL1, stratum_B, strata_B, np.zeros(rows, np.float32))
    keys_B = mixture.row_keys(jax.random.key(0), rows)
    objective_B = stratum_B % len(names)
    example = jax.jit(functools.partial(mixture.make_examples, objectives))(row, objective_B, keys_B)
    return example.key_start_L, example.key_end_L


def both_passes(ranges: tuple[jax.Array, jax.Array], backend: str) -> Callable:
    """Returns a function of (q, k, v) that computes attention and the gradients of a weighted sum of it."""
    attend = attend_cudnn if backend == CUDNN else functools.partial(attention.attend, backend=backend)

    def run(q, k, v):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, *ranges), q, k, v)
        return out, *pull(jnp.cos(out))

    return run


def attend_cudnn(q, k, v, key_start_BxL, key_end_BxL) -> jax.Array:
    """Computes attention with cuDNN, which materializes the mask, [B, L, L]."""
    mask_Bx1xLxL = attention.range_mask(key_start_BxL, key_end_BxL, k.shape[1])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask_Bx1xLxL, implementation="cudnn")


def compiled_ways(qkv: Sequence[jax.Array], ranges: tuple[jax.Array, jax.Array]) -> dict:
    """Returns the compiled implementations for this platform, the reference first."""
    ways = {PEER: ("xla", _LENGTH.value)}
    ways |= {f"{queries} queries per chunk": ("xla", queries) for queries in _QUERIES.value}
    if kernel := attention.KERNELS.get(jax.default_backend()):
        ways[kernel] = (kernel, _LENGTH.value)
    if jax.default_backend() == "gpu" and _DTYPE.value == "bfloat16":  # cuDNN supports half precision only
        ways[CUDNN] = (CUDNN, _LENGTH.value)
    compiled = {}
    for name, (backend, queries) in ways.items():
        with mock.patch.object(attention, "QUERIES", queries):
            compiled[name] = jax.jit(both_passes(ranges, backend)).lower(*qkv).compile()
    return compiled


def largest_difference(found: Sequence[jax.Array], expected: Sequence[jax.Array]) -> float:
    """Returns the largest difference of outputs and gradients, relative to the largest expected value."""

    def one(ours, theirs) -> float:
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        return float(np.abs(ours - theirs).max() / np.abs(theirs).max())

    return max(map(one, found, expected))


def main(_: Sequence[str]) -> None:
    rows, length, heads, width = _ROWS.value, _LENGTH.value, _HEADS.value, _WIDTH.value
    qkv = jax.random.normal(jax.random.key(1), (3, rows, length, heads, width), _DTYPE.value)
    ways = compiled_ways(qkv, key_ranges(rows, length))
    expected = ways[PEER](*qkv)
    results = {
        name: {
            "difference": largest_difference(way(*qkv), expected),
            "temporary_mib": way.memory_analysis().temp_size_in_bytes / 2**20,
        }
        for name, way in ways.items()
    }
    seconds = {name: [] for name in ways}
    for _ in range(_ROUNDS.value):
        for name, way in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(way(*qkv))
            seconds[name].append(time.perf_counter() - start)
    for name, result in results.items():
        result["milliseconds"] = 1e3 * statistics.median(seconds[name])
        ratios = [ours / peer for ours, peer in zip(seconds[name], seconds[PEER], strict=True)]
        result["time_over_peer"] = statistics.median(ratios)
    device = jax.devices()[0].device_kind
    say(f"{rows} sequences of {length} tokens, {heads} heads of dimension {width}, {_DTYPE.value}, {device}")
    columns = ["difference", "temporary_mib", "milliseconds", "time_over_peer"]
    formats = dict(zip(columns, [".1e", ".0f", ".1f", ".2f"], strict=True))
    lines = [[name, *(format(r[c], formats[c]) for c in columns)] for name, r in results.items()]
    say(table(["implementation", "difference", "temporary MiB", "ms", "time over reference"], lines))
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(results, indent=1) + "\n")
    exact = (
        _DTYPE.value == "float32" and jax.default_backend() == "cpu"
    )  # other platforms and dtypes round more
    wrong = [name for name, r in results.items() if not r["difference"] < (1e-4 if exact else 0.05)]
    if wrong:
        raise UserError(
            f"differs from XLA attention on all queries by more than rounding: {', '.join(wrong)}"
        )


if __name__ == "__main__":
    cli.run(main)
