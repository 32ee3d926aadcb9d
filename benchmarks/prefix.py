"""What it gains to see a context from both sides: loss of the second half of held-out pieces of text after
their first, in causal and in prefix mode, on the same tokens.

    python benchmarks/prefix.py --workdir='runs/sweep/cells/*' --pieces=500
"""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dualsm.config import freeze
from dualsm.data.corpus import Corpus
from dualsm.evaluation.modes import Scoring
from dualsm.evaluation.scoring import Scorer
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.progress import say, table
from dualsm.rundir.trained_run import open_run

_WORKDIR = flags.DEFINE_multi_string(
    "workdir", None, "folder of a run, or a pattern of such; repeat for each"
)
_PIECES = flags.DEFINE_integer("pieces", 500, "pieces of text, a row long, from the held-out documents")
_OUTPUT = cli.DEFINE_path("output", "", "JSON file for the results; empty: none")
flags.mark_flags_as_required(["workdir"])


def held_out_pieces(path: str, length: int, count: int) -> list[tuple[list[int], list[int]]]:
    """(first half, second half) of `count` pieces of `length` tokens, evenly from all held-out documents."""
    documents = Corpus(path).documents("valid")
    places = [
        (document, start)
        for document, size in enumerate(documents.lengths_N)
        for start in range(0, int(size) - length + 1, length)
    ]
    if len(places) < count:
        raise UserError(f"--pieces={count}: {path} holds out {len(places)} pieces of {length} tokens")
    chosen = [places[i * len(places) // count] for i in range(count)]
    pieces = documents.read([d for d, _ in chosen], [s for _, s in chosen], [s + length for _, s in chosen])
    return [(list(piece[: length // 2]), list(piece[length // 2 :])) for piece in pieces]


def measure(workdir: str, count: int) -> dict:
    """Nats a token in both modes, and the mean difference with its standard error over the pieces."""
    run = open_run(workdir)
    longest = run.config.seq_len
    pieces = held_out_pieces(run.config.data.path, longest - 1, count)
    scorer = Scorer(freeze(run.config.model), run.params, run.tokenizer, run.mesh)
    nats = {}
    for mode in ("causal", "prefix"):
        scores = scorer.score_tokens(pieces, Scoring(mode, longest=longest), quiet=True)
        nats[mode] = -scores.log_likelihood_N / scores.tokens_N
    gain_N = nats["causal"] - nats["prefix"]
    return {mode: float(nats_N.mean()) for mode, nats_N in nats.items()} | {
        "gain": float(gain_N.mean()),
        "stderr": float(gain_N.std(ddof=1) / len(gain_N) ** 0.5),
    }


def main(_: Sequence[str]) -> None:
    workdirs = sorted(path for pattern in _WORKDIR.value for path in glob.glob(pattern))
    if not workdirs:
        raise UserError(f"--workdir={','.join(_WORKDIR.value)} matches nothing")
    results = {workdir: measure(workdir, _PIECES.value) for workdir in workdirs}
    rows = [
        [Path(name).name, f"{r['causal']:.3f}", f"{r['prefix']:.3f}", f"{r['gain']:.4f} ± {r['stderr']:.4f}"]
        for name, r in results.items()
    ]
    say(table(["nats a token", "causal", "prefix", "gain"], rows))
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
