"""Measures the gain from bidirectional attention to a prefix.

Compares the loss on the second half of held-out segments, given the first half, in causal and in prefix mode.

    python benchmarks/prefix.py --workdir='runs/sweep/cells/*' --segments=500
"""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dualsm.config import freeze
from dualsm.data.corpus import Corpus
from dualsm.evaluation.modes import ScoringParams
from dualsm.evaluation.scoring import Scorer
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.progress import say, table
from dualsm.rundir.trained_run import open_run

_WORKDIR = flags.DEFINE_multi_string("workdir", None, "run directory or glob; can be repeated")
_SEGMENTS = flags.DEFINE_integer("segments", 500, "number of held-out segments of the sequence length")
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")
flags.mark_flags_as_required(["workdir"])


def held_out_segments(path: str, length: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Returns `count` held-out segments of `length` tokens, evenly spaced, as (first half, second half)."""
    documents = Corpus(path).documents("valid")
    starts = [
        (document, start)
        for document, size in enumerate(documents.lengths_N)
        for start in range(0, int(size) - length + 1, length)
    ]
    if len(starts) < count:
        raise UserError(
            f"--segments={count}: {path} has only {len(starts)} segments of {length} tokens; lower it"
        )
    chosen = [starts[i * len(starts) // count] for i in range(count)]
    segments = documents.read([d for d, _ in chosen], [s for _, s in chosen], [s + length for _, s in chosen])
    return [(list(segment[: length // 2]), list(segment[length // 2 :])) for segment in segments]


def measure(workdir: str, count: int) -> dict:
    """Returns nats per token in both modes, and the mean difference with its standard error over segments."""
    run = open_run(workdir)
    longest = run.config.seq_len
    segments = held_out_segments(run.config.data.path, longest - 1, count)
    scorer = Scorer(freeze(run.config.model), run.params, run.tokenizer, run.mesh)
    nats = {}
    for mode in ("causal", "prefix"):
        scores = scorer.score_tokens(segments, ScoringParams(mode, max_length=longest), quiet=True)
        nats[mode] = -scores.log_likelihood_N / scores.tokens_N
    gain_N = nats["causal"] - nats["prefix"]
    return {mode: float(nats_N.mean()) for mode, nats_N in nats.items()} | {
        "gain": float(gain_N.mean()),
        "stderr": float(gain_N.std(ddof=1) / len(gain_N) ** 0.5),
    }


def main(_: Sequence[str]) -> None:
    workdirs = sorted(path for pattern in _WORKDIR.value for path in glob.glob(pattern))
    if not workdirs:
        raise UserError(
            f"--workdir={','.join(_WORKDIR.value)} matches no run directory; check the path or quote the glob"
        )
    results = {workdir: measure(workdir, _SEGMENTS.value) for workdir in workdirs}
    rows = [
        [Path(name).name, f"{r['causal']:.3f}", f"{r['prefix']:.3f}", f"{r['gain']:.4f} ± {r['stderr']:.4f}"]
        for name, r in results.items()
    ]
    say(table(["nats per token", "causal", "prefix", "gain"], rows))
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
