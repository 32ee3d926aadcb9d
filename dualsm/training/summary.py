"""What came of a run, as a short table."""

from __future__ import annotations

import statistics
from pathlib import Path

from dualsm.data.corpus import Corpus
from dualsm.process.progress import table
from dualsm.rundir.metrics import read_metrics


def summarise(workdir: str | Path, corpus: Corpus | None = None) -> str:
    """Held-out bits per byte of each objective before and after, speed, and where things are.

    Before training they are of a sample of the rows (see `dualsm.training.loop`). What the log lines do not
    tell is left out.

    Args:
      workdir: of the run.
      corpus: whose held-out documents were all scored at the end; adds what `gzip -9` needs for the same.
    """
    records, lines = read_metrics(workdir), []
    validated = [r for r in records if any(name.startswith("valid/") for name in r)]
    if validated:
        lines.append(_scores(validated[0], validated[-1], corpus))
    speeds = [r["perf/tokens_per_second"] for r in records if "perf/tokens_per_second" in r]
    if speeds:
        lines.append(f"{records[-1]['tokens']:,} tokens at {statistics.median(speeds):,.0f} a second")
    lines.append(f"{workdir}: config.json, metrics.jsonl, tensorboard/, checkpoints/")
    return "\n".join(lines)


def _scores(before: dict, after: dict, corpus: Corpus | None) -> str:
    """The table of two log lines' held-out bits per byte."""
    names = [name for name in after if name.endswith("/bits_per_byte")]
    rows = [
        [name.split("/")[1], f"{before.get(name, float('nan')):.3f}", f"{after[name]:.3f}"] for name in names
    ]
    if corpus is not None:
        held_out = corpus.manifest["splits"]["valid"]
        rows.append(["(gzip -9)", "", f"{8 * held_out['gzip_bytes'] / held_out['bytes']:.3f}"])
    return table(["held-out bits per byte", "before", "after"], rows)
