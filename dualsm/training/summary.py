"""Summary of a finished run, for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from etils import epath

from dualsm.data.corpus import Corpus
from dualsm.process.progress import table
from dualsm.rundir.checkpoint_folder import CHECKPOINTS
from dualsm.rundir.metrics import METRICS, read_metrics
from dualsm.rundir.trackers import TENSORBOARD
from dualsm.rundir.workdir import CONFIG


def summarize(workdir: epath.PathLike, corpora: Sequence[Corpus] = (), tensorboard: bool = True) -> str:
    """Returns the held-out bits per byte before and after training, the speed, and the paths of the outputs.

    The values before training are those of a sample of the rows (see `dualsm.training.loop`). Values that
    are missing from the metrics file are omitted.

    Args:
      workdir: the run directory.
      corpora: adds the bits per byte of `gzip -9` on the held-out splits of these corpora. Empty unless the
        run scored the whole splits, because the values are not comparable otherwise.
      tensorboard: the run wrote TensorBoard event files (`config.log.tensorboard`).
    """
    records, lines = read_metrics(workdir), []
    validated = [r for r in records if any(name.startswith("valid/") for name in r)]
    if validated:
        lines.append(_scores(validated[0], validated[-1], corpora))
    speeds = [r["perf/tokens_per_second"] for r in records if "perf/tokens_per_second" in r]
    if speeds:
        speed = statistics.median(speeds[1:] or speeds)  # the first line includes compilation
        lines.append(f"{records[-1]['tokens']:,} tokens, {speed:,.0f} tokens per second")
    names = [CONFIG, METRICS, *([f"{TENSORBOARD}/"] if tensorboard else []), f"{CHECKPOINTS}/"]
    lines.append(f"{workdir}: {', '.join(names)}")
    return "\n".join(lines)


def _scores(before: dict, after: dict, corpora: Sequence[Corpus]) -> str:
    """Returns a table of the held-out bits per byte in two log lines."""
    names = [name for name in after if name.endswith("/bits_per_byte")]
    rows = [
        [
            name.removeprefix("valid/").removesuffix("/bits_per_byte"),
            f"{before.get(name, float('nan')):.3f}",
            f"{after[name]:.3f}",
        ]
        for name in names
    ]
    if corpora:
        held_out = [corpus.manifest["splits"]["valid"] for corpus in corpora]
        compressed, size = (sum(split[key] for split in held_out) for key in ("gzip_bytes", "bytes"))
        rows.append(["(gzip -9)", "", f"{8 * compressed / size:.3f}"])
    return table(["held-out bits per byte", "before", "after"], rows)
