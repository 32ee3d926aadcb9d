"""Evaluation results as text tables and warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dualsm.evaluation.acceptance import SAMPLINGS
from dualsm.process.progress import table
from dualsm.training.valid_rows import INEXACT_BYTES


def results_table(results: Mapping, modes: Sequence[str]) -> str:
    """Formats results as tables: one of the tasks in each of `modes`, one of held-out text."""
    average = ", moving average of the weights" * (results.get("parameters") == "ema")
    parts = [f"{results['workdir']}, step {results['checkpoint']}{average}"]
    if results["tasks"]:
        parts.append("accuracy in percent ± standard error\n" + _task_table(results["tasks"], modes))
        parts.append(
            "bits per byte of the correct answer, and its margin over the best wrong answer, "
            "± standard error\n" + _answer_table(results["tasks"], modes)
        )
    if held_out := results.get("held_out"):
        parts.append(_held_out_table(held_out))
    if acceptance := results.get("acceptance"):
        parts.append(_acceptance_table(acceptance))
    if infilling := results.get("infilling"):
        parts.append(_infilling_table(infilling))
    return "\n\n".join(parts)


def _held_out_table(held_out: Mapping) -> str:
    rows = []
    for name, result in held_out.items():
        rows.append([name, *_loss_cells(result), result["samples"]])
        for domain, part in result.get("domains", {}).items():
            rows.append([f"  {domain}", *_loss_cells(part), ""])
    header = ["held-out text", "nats per token", "perplexity", "bits per byte", "documents", "draws"]
    return table(header, rows)


def _loss_cells(result: Mapping) -> list:
    """Returns the cells of a loss; its standard error is over documents."""
    return [
        _format_loss(result["nats_per_token"], result["stderr"]),
        f"{result['perplexity']:.2f}",
        _format_loss(result["bits_per_byte"], result["bits_per_byte_stderr"]),
        result["documents"],
    ]


def _format_loss(loss: float, stderr: float | None) -> str:
    return f"{loss:.4f}" if stderr is None else f"{loss:.4f} ± {stderr:.4f}"


def _acceptance_table(acceptance: Mapping) -> str:
    rows = [
        [
            name,
            f"{r['accepted_per_draft']:.2f}{_format_stderr(r['stderr'])}",
            f"{r['tokens_per_forward']:.2f}",
        ]
        for name, r in acceptance.items()
        if name in SAMPLINGS
    ]
    header = [f"drafts of {acceptance['draft']} tokens", "accepted per draft", "tokens per forward pass"]
    return table(header, rows)


def _infilling_table(infilling: Mapping) -> str:
    cells = ["", "", infilling["n"]]
    if infilling["n"]:
        bits = _format_estimate(infilling["bits_per_byte"], infilling["bits_per_byte_stderr"])
        cells[:2] = _format_accuracy(infilling["accuracy"], infilling["stderr"]), bits
    return table(["infilling", "exact, percent", "bits per byte", "n"], [["single words", *cells]])


def _format_stderr(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {stderr:.2f}"


def _task_table(tasks: Mapping, modes: Sequence[str]) -> str:
    rows = []
    for name, by_mode in tasks.items():
        first = by_mode[modes[0]]
        results = [by_mode[mode] for mode in modes]
        cells = (_format_accuracy(r["score"], r["stderr"]) for r in results)
        rows.append([name, first["metric"], first["n"], *cells])
        if "slor" in first["metrics"]:
            slor = [r["metrics"]["slor"] for r in results]
            rows.append(["", "slor", "", *(_format_accuracy(m["accuracy"], m["stderr"]) for m in slor)])
        for baseline in first["baselines"]:
            known = [r["baselines"][baseline] for r in results]
            cells = (_format_accuracy(r["score"], r["stderr"]) for r in known)
            rows.append([f"  {baseline}", "", "", *cells])
    floors = {"normalised": "guessing"}
    if any(by_mode[mode]["baselines"] for by_mode in tasks.values() for mode in modes):
        floors["above_baselines"] = "best baseline"
    for key, floor in floors.items():
        values = [[by_mode[mode][key] for by_mode in tasks.values()] for mode in modes]
        means = ["" if None in scores else f"{np.mean(scores):.1f}" for scores in values]
        rows.append([f"mean (0 {floor}, 100 perfect)", "", "", *means])
    return table(["task", "metric", "n", *modes], rows)


def _answer_table(tasks: Mapping, modes: Sequence[str]) -> str:
    rows = []
    for name, by_mode in tasks.items():
        answers = [by_mode[mode]["answer"] for mode in modes]
        for label, key in ((name, "bits_per_byte"), ("  margin", "margin")):
            rows.append([label, *(_format_estimate(a[key], a[f"{key}_stderr"]) for a in answers)])
    return table(["task", *modes], rows)


def _format_estimate(mean: float | None, stderr: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.3f}" if stderr is None else f"{mean:.3f} ± {stderr:.3f}"


def _format_accuracy(accuracy: float | None, stderr: float | None) -> str:
    if accuracy is None:
        return ""
    return f"{100 * accuracy:.1f}" if stderr is None else f"{100 * accuracy:.1f} ± {100 * stderr:.1f}"


def results_warnings(results: Mapping) -> list[str]:
    """Returns a warning for each limitation of the results: truncated contexts, skipped questions, bytes."""
    warnings = []
    for name, by_mode in results["tasks"].items():
        counts = {key: max(r[key] for r in by_mode.values()) for key in ("contexts_truncated", "skipped")}
        limit = f"{max(r['settings']['max_length'] for r in by_mode.values())} tokens (the sequence length)"
        if count := counts["contexts_truncated"]:
            warnings.append(f"{name}: {count} contexts were truncated on the left to fit into {limit}")
        if count := counts["skipped"]:
            warnings.append(
                f"{name}: {count} questions were skipped because an answer is empty or longer than {limit}"
            )
    if results.get("infilling", {}).get("n") == 0:
        warnings.append(
            "infilling was not measured: no word of the held-out text consists of whole tokens, or the "
            "tokenizer does not reproduce the text"
        )
    if any(r["bytes_of"] == "tokens" for r in results.get("held_out", {}).values()):
        warnings.append(INEXACT_BYTES)
    return warnings
