"""Model card (README.md) of an exported run, generated from its run directory."""

from __future__ import annotations

import json
import posixpath

from etils import epath
from ml_collections import ConfigDict

from dualsm.config import save_config
from dualsm.data.corpus import MANIFEST
from dualsm.exchange.tokenizer_export import exported_tokenizer, external_special_ids, special_pieces
from dualsm.exchange.weights_source import read_source
from dualsm.generation.generate import is_shifted
from dualsm.objectives.pairs import Entry
from dualsm.objectives.plan import MixturePlan, count_sequences
from dualsm.objectives.registry import OBJECTIVES
from dualsm.objectives.shares import shares_by_source, trained_objectives
from dualsm.objectives.sources import Source, trained_sources
from dualsm.process.paths import user_path
from dualsm.rundir.metrics import read_metrics
from dualsm.rundir.results import results_file
from dualsm.rundir.trained_run import TrainedRun
from dualsm.rundir.workdir import read_config

_MODES = {
    "causal": "each token attends to itself and earlier tokens",
    "prefix": "attention is bidirectional within the prompt and causal after it",
    "masked": "attention is bidirectional; the model predicts the tokens at `{mask}`",
}

_OTHER_TARGETS = ("diverse_causal", "next_all")  # objectives that predict tokens further ahead


def model_card(run: TrainedRun, plain: bool) -> str:
    """Returns the text of the model card.

    Args:
      run: the exported run.
      plain: True if the run is exported for a stock class of transformers.
    """
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [dualsm]\n---",
        f"# {run.workdir.name}",
        "A language model trained with dualsm on the mixture of objectives below "
        "([Dual-objective Language Models](https://arxiv.org/abs/2512.14549)).",
        _use(run, plain),
        "## Training\n\n" + _table(["", ""], _training(run)),
        _mixture(run),
        _scores(run),
        f"## Config\n\n```json\n{save_config(read_config(run.workdir))}```",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _use(run: TrainedRun, plain: bool) -> str:
    tokenizer = exported_tokenizer(run)
    bos, mask = (special_pieces(tokenizer)[role] for role in ("bos", "mask"))
    trust = "" if plain else ", trust_remote_code=True"
    lines = [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})',
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})',
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        "```",
        "",
        f"{_targets(run)} The tokenizer prepends `{bos}`. By default it encodes special tokens in a text as "
        "plain text.",
    ]
    if is_shifted(run) and external_special_ids(tokenizer)["mask"] is not None:
        lines += [f"For `{mask}` as the mask token, call `tokenizer(text, split_special_tokens=False)`."]
    if plain:
        others = "the other modes" if is_shifted(run) else "the mode `prefix`"
        lines += ["", f"The stock class supports causal attention only; for {others} use dualsm."]
    else:
        lines += ["", "Modes of `model(...)`; `model.generate(...)` supports all except the last:", ""]
        lines += [f'- `mode="{mode}"`: {text.format(mask=mask)}' for mode, text in _MODES.items()]
        lines += [
            "",
            "`AutoModelForMaskedLM` loads the folder as a masked language model, whose logits at position i "
            "predict token i. With `masked_lm_shifted=True` they predict token i + 1.",
        ]
    return "\n".join(lines)


def _targets(run: TrainedRun) -> str:
    """Returns sentences about the token that each position predicts."""
    others = [
        f"with `{name}`, position i predicts {OBJECTIVES[name].predicts}"
        for name in trained_objectives(run.config)
        if name in _OTHER_TARGETS
    ]
    text = "Without mode tokens, position i" if others else "Position i"
    if is_shifted(run):
        text += (
            " predicts token i + 1, so the prediction for a masked token is the output at the position "
            "before it."
        )
    else:
        text += (
            " predicts token i + 1, but masked diffusion was trained unshifted, with token i as the target "
            "of position i. Do not use the exported model to predict masked tokens."
        )
    if others:
        text += f" A mode token in place of a document's first token changes the target: {'; '.join(others)}."
    return text


def _training(run: TrainedRun) -> list[tuple]:
    config = run.config
    tokens = count_sequences(config, run.step) * config.seq_len
    rows = [
        ("steps", f"{run.step:,} of {config.steps:,}"),
        ("tokens seen", f"{tokens:,} (sequence length {config.seq_len:,}, batch size {config.batch_size:,})"),
        *_repetition(config),
        ("vocabulary size", f"{config.model.vocab_size:,}"),
        ("seed", config.seed),
    ]
    if run.parameters == "ema":
        rows.insert(0, ("weights", _average_text(config.ema)))
    source = read_source(run)
    if source:
        details = ", ".join(filter(None, (source["format"], source.get("sha256", "")[:12])))
        rows.insert(0, ("started from", f"{source['weights']} ({details})"))
    for source in trained_sources(config):
        rows += _data(source, (config.sources[source.name] if source.name else config.data).identity)
    return rows


def _repetition(config: ConfigDict) -> list[tuple]:
    """Returns table rows about the unique tokens of a run and of each source."""
    if not config.sources:
        (source,) = trained_sources(config)
        unique = source.unique(count_sequences(config) * config.seq_len)
        return [("repetitions of the data", f"{config.repetitions:,}"), ("unique tokens", f"{unique:,}")]
    rows, plan = [], MixturePlan(config)
    for source, sequences in zip(plan.sources, plan.source_sequences(config.steps), strict=True):
        budget = sequences * config.seq_len
        unique = source.unique(budget)
        rows.append(
            (
                f"source {source.name}",
                f"{budget:,} tokens of the run, {unique:,} unique tokens x {budget / unique:.4g} repetitions",
            )
        )
    return rows


def _average_text(ema: ConfigDict) -> str:
    return (
        f"exponential moving average, decay {ema.decay:g} every {ema.every:,} steps from step {ema.start:,}"
    )


def _data(source: Source, identity: str) -> list[tuple]:
    """Returns table rows about a corpus; only its name and identity if it was moved or changed."""
    path, name = source.corpus, f"corpus of {source.name}" if source.name else "corpus"
    rows = [(name, f"`{user_path(path).name}`, identity {identity[:12]}")] if identity else []
    manifest = _read(user_path(path) / MANIFEST) if path else None
    if manifest and manifest.get("identity") == identity:
        train, inputs = manifest["splits"]["train"], manifest["arguments"]["input"]
        rows += [
            ("prepared from", ", ".join(f"`{posixpath.basename(part)}`" for part in inputs.split(","))),
            ("training split", f"{train['documents']:,} documents, {train['bytes']:,} bytes"),
        ]
    return rows


def _mixture(run: TrainedRun) -> str:
    """Returns the shares of the objectives and pairs, over the finished steps if they change."""
    config = run.config
    rows = []
    for part in shares_by_source(config):
        first = [part.source.name] if part.source.name else []
        share_S = part.share_S[: max(run.step, 1)]
        share_E = share_S @ part.within_SxE[: max(run.step, 1)] / max(share_S.sum(), 1e-9)
        rows += [
            (*first, _entry_text(entry), f"{share:.4g}")
            for entry, share in zip(part.entries, share_E, strict=True)
            if share
        ]
    header = ["objective", "share of sequences"]
    if config.sources:
        header = ["source", "objective", "share of the source's sequences"]
    return "## Mixture\n\n" + _table(header, rows)


def _entry_text(entry: Entry) -> str:
    """Returns the name of an entry, with the loss weights of a pair."""
    if entry.rows == 1:
        return entry.name
    losses = " + ".join(f"{member.weight:g} {member.objective}" for member in entry.members)
    return f"{entry.name}: {losses} on the same sequences"


def _scores(run: TrainedRun) -> str:
    rows = []
    results = _read(results_file(run.workdir, run.step, run.parameters)) or {}
    for task, modes in results.get("tasks", {}).items():
        for mode, result in modes.items():
            rows.append((task, mode, _score(result)))
    valid = ["valid"] if run.parameters == "last" else ["valid", run.parameters]
    for record in read_metrics(run.workdir):
        if record["step"] == run.step:
            for name, value in record.items():
                parts = name.split("/")
                if parts[:-2] == valid and parts[-1] == "bits_per_byte":
                    rows.append(("held-out text", parts[-2], f"{value:.3f} bits per byte"))
    if not rows:
        return "## Scores\n\nNo scores were recorded; see `python -m dualsm.evaluate`."
    return "## Scores\n\n" + _table(["task", "mode or objective", "score"], rows)


def _score(result: dict) -> str:
    """Formats a task's accuracy; a single question has no standard error."""
    if result["score"] is None:
        return "every question was skipped"
    error = "" if result["stderr"] is None else f" ± {100 * result['stderr']:.1f}"
    return f"{100 * result['score']:.1f}{error} % (n = {result['n']:,})"


def _read(path: epath.Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _table(header: list[str], rows: list[tuple]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
