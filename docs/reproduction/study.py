"""Runs the study of docs/reproduction/protocol.md on one device: tune, choose, confirm.

python docs/reproduction/study.py --corpora=runs/study --output=runs/study_results

`--corpora` contains the corpora A, B, C and D, whose held-out text is the dev split, and `test`, whose
held-out text is the test split; protocol.md has the commands that make them. Each run is a line of
`runs.jsonl`; a repeated call continues with the runs that are missing. `--known=docs/reproduction`
also reads the tables of that folder, trains only the missing runs, and writes all of them to `--output`.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import sys
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.starved import get_config
from dualsm.data.corpus import Corpus
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.sweeps.vectorized import train_together
from dualsm.training.run_corpora import open_corpora
from dualsm.training.start import complete
from dualsm.training.valid_rows import valid_rows

FLAGS = flags.FLAGS

ALPHAS = {128: (1 / 4, 1 / 2, 3 / 4, 15 / 16, 1.0), 32: (1 / 2, 3 / 4, 15 / 16, 1.0)}
DECAYS = {128: (0.3, 0.5, 1.0, 2.0), 32: (0.1, 0.3, 1.0)}
LENGTHS = {128: (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1), 32: (1 / 4, 1 / 2, 1)}
REPLICATES = [(corpus, seed) for corpus in "BCD" for seed in (1, 2)]
DROPOUT = 0.1
EMA = 0.995
SCORED = ["causal", "masked_diffusion"]
# Methods that were added after the protocol's: recipe and alpha -> weight decays and length of their tuning.
MORE = {
    ("dropout", 1 / 2): ((0.3, 0.5), 1),
    ("dropout", 1 / 4): ((0.3, 0.5), 1),
    ("mir+dropout", 1.0): ((0.5, 1.0, 2.0), 1 / 2),
}
FINER_DECAYS = {1.0: (1.4, 1.7), 15 / 16: (1.4,), 3 / 4: (0.7, 1.4)}  # by alpha
# Alpha, weight decay and length of runs of the size 1.0M on corpus B.
LARGER = ((1.0, 0.5, 1 / 4), (3 / 4, 1.0, 1 / 4), (3 / 4, 1.0, 1 / 2))
OPTIMIZER_RECIPES = ("linear", "exempt", "adamw")  # of the best mixture
ADAMW_RATE = 0.003  # of the recipe "adamw"; Muon has 0.01
HIGH_RATE = 0.02  # learning rate of the recipe "rate"; the others have 0.01
POINTS = 16  # of the learning curve of a full run
# name -> layers, d_model, heads, steps of a full run: 60 to 65 tokens per parameter
SIZES = {"61k": (2, 32, 1, 464), "230k": (3, 64, 2, 1840), "1.0M": (4, 128, 4, 7360)}

# Settings of a run -> the function that reads them.
KEYS = {"recipe": str, "R": int} | dict.fromkeys(("alpha", "weight_decay", "length"), float)
KEYS |= {"corpus": str, "seed": int, "size": str, "causal_weight": float}
# Columns of losses in runs.csv -> their names in results.
COLUMNS = {
    f"{'ema_' * averaged}{split}_{objective}": f"{'ema/' * averaged}{split}/{objective}/loss"
    for averaged in (False, True)
    for split in ("dev", "test")
    for objective in SCORED
}


def cell(recipe, repetitions, alpha, decay, length, corpus, seed, size="230k", weight=1.0) -> dict:
    """Returns a run of the study.

    Args:
      recipe: "plain", or "dropout", "mir" (a pair; alpha is not used), "linear" (weight decay that falls
        linearly to 0), "exempt" (no weight decay for embeddings and vectors), "adamw" (another learning
        rate for the parameters that AdamW updates), "rate" (another learning rate), joined by "+".
      repetitions: R of a full run; a shorter run has the same unique tokens and fewer repetitions.
      alpha: share of causal rows.
      decay: weight decay.
      length: share of the full run's tokens.
      corpus: "A" to "D".
      seed: seed of initialization, order and corruption.
      size: key of `SIZES`.
      weight: loss weight of the causal objective.
    """
    values = (recipe, repetitions, alpha, decay, length, corpus, seed, size, weight)
    return dict(zip(KEYS, values, strict=True))


def name_of(run: dict) -> str:
    """Returns the name of a run; equal settings have equal names, also 1 and 1.0."""
    return ",".join(f"{key}={_text(run[key])}" for key in sorted(run))


def _text(value: str | float) -> str | float:
    return f"{value:g}" if isinstance(value, float) else value


def settings_of(run: dict, corpora: Path) -> ConfigDict:
    """Returns the config of a run, without the keys that follow from the corpora."""
    config = get_config(f"alpha={run['alpha']},repetitions={max(1, round(run['R'] * run['length']))}")
    layers, width, heads, steps = SIZES[run["size"]]
    config.model.num_layers, config.model.d_model, config.model.num_heads = layers, width, heads
    config.model.d_ff = 3 * width
    parts = run["recipe"].split("+")
    # The two rows of a pair train the same tokens.
    config.steps = round(steps * run["length"]) * (2 if "mir" in parts else 1)
    config.seed, config.optimizer.weight_decay = run["seed"], float(run["weight_decay"])
    config.objectives.causal.weight = float(run["causal_weight"])
    if "mir" in parts:
        config.mixture.causal = config.mixture.masked_diffusion = 0.0
        config.mixture.mir = 1.0
    config.model.dropout = DROPOUT if "dropout" in parts else 0.0
    config.optimizer.weight_decay_schedule.name = "linear" if "linear" in parts else "learning_rate"
    config.optimizer.weight_decay_exempt = "embeddings,vectors" if "exempt" in parts else ""
    config.optimizer.adamw_learning_rate = ADAMW_RATE if "adamw" in parts else 0.0
    if "rate" in parts:
        config.optimizer.learning_rate = HIGH_RATE
    config.ema.decay = EMA
    config.model.remat = "none"
    config.data.path = str(corpora / run["corpus"])
    return config


def config_of(run: dict, corpora: Path) -> ConfigDict:
    """Returns the complete config of a run."""
    config = settings_of(run, corpora)
    return complete(config, open_corpora(config))


def tuning(recipe: str, repetitions: int, alphas) -> list[dict]:
    """Returns the runs on corpus A that choose weight decay and length."""
    grid = itertools.product(alphas, DECAYS[repetitions], LENGTHS[repetitions])
    return [
        cell(recipe, repetitions, alpha, decay, length, "A", 0)
        for alpha, decay, length in grid
        if length > 1 / 16 or alpha > 3 / 4 or recipe == "mir"
    ]


MORE_TUNING = [
    cell(recipe, 128, alpha, decay, length, "A", 0)
    for (recipe, alpha), (decays, length) in MORE.items()
    for decay in decays
]


def exploring(chosen: dict) -> list[dict]:
    """Returns the runs that were added after the results of the others."""
    runs = [
        cell("plain", 128, alpha, decay, 1, "A", 0)
        for alpha, decays in FINER_DECAYS.items()
        for decay in decays
    ]
    stop = chosen["plain,128,1.0"]["stop"]["run"] | {"recipe": "rate"}
    mixture = chosen[f"plain,128,{best_alpha(chosen, 128, 'full')}"]["full"]["run"]
    runs += [stop | {"weight_decay": decay} for decay in (0.5, 0.7, 1.0, 1.4)]
    runs += [mixture | {"recipe": "rate", "weight_decay": decay} for decay in (0.5, 0.7, 1.0, 1.4)]
    finer = cell("plain", 128, 1.0, FINER_DECAYS[1.0][0], 1, "A", 0)
    confirmed = [finer, stop, *(mixture | {"recipe": recipe} for recipe in OPTIMIZER_RECIPES)]
    runs += [run | {"corpus": c, "seed": seed} for run in confirmed for c, seed in REPLICATES]
    runs += [finer | {"size": "61k", "corpus": corpus, "seed": 1} for corpus in "BC"]
    return runs + [cell("plain", 128, *setting, "B", 1, "1.0M") for setting in LARGER]


def choose(results: list[dict]) -> dict[str, dict]:
    """Returns, by (recipe, R, alpha), the best run on corpus A in causal loss on the dev split.

    `full` is the best full run, `stop` the best run of any length.
    """
    chosen = {}
    for result in results:
        run = result["run"]
        if not result["stage"].startswith("tune"):
            continue
        key = f"{run['recipe']},{run['R']},{run['alpha']}"
        for kind in ("full", "stop"):
            if kind == "full" and run["length"] != 1:
                continue
            best = chosen.setdefault(key, {}).get(kind)
            loss = result["dev/causal/loss"]
            loss = loss if math.isfinite(loss) else math.inf  # a run that diverged is not chosen
            if best is None or loss < best["loss"]:
                chosen[key][kind] = {"loss": loss, "run": run}
    return chosen


def best_alpha(chosen: dict, repetitions: int, kind: str) -> float:
    """Returns the mixture, alpha < 1, with the lowest causal loss on the dev split."""
    alphas = [alpha for alpha in ALPHAS[repetitions] if alpha < 1]
    return min(alphas, key=lambda alpha: chosen[f"plain,{repetitions},{alpha}"][kind]["loss"])


def confirming(chosen: dict, keys, replicates) -> list[dict]:
    """Returns the replicates of the chosen runs."""
    picked = [chosen[key][kind]["run"] for key in keys for kind in ("full", "stop")]
    runs = [run | {"corpus": corpus, "seed": seed} for run in picked for corpus, seed in replicates]
    return list({name_of(run): run for run in runs}.values())


def write_tables(results: list[dict], folder: Path) -> None:
    """Writes `runs.csv`, a line per run, and `curves.csv`, a line per point of the confirmed runs.

    Losses are in nats per token; `ema_` is the moving average of the weights. Curves are of a quarter of the
    dev split.
    """
    results = sorted(results, key=lambda result: (result["stage"], name_of(result["run"])))
    write_runs(results, folder / "runs.csv")
    with (folder / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEYS, "step", "train", *SCORED])
        for result in results:
            if result["run"]["corpus"] != "A":
                run = [*map(_text, result["run"].values())]
                for step, *losses in result["curve"]:
                    writer.writerow([*run, step, *(f"{loss:.4f}" for loss in losses)])


def write_runs(results: list[dict], path: Path) -> None:
    """Writes a line per run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["stage", *KEYS, "steps", "skipped", *COLUMNS])
        for result in results:
            losses = [f"{result[name]:.4f}" for name in COLUMNS.values()]
            run = map(_text, result["run"].values())
            writer.writerow([result["stage"], *run, result["steps"], int(result["skipped"]), *losses])


def read_results(folder: Path) -> list[dict]:
    """Returns the results in the tables that `write_tables` wrote."""

    def run_of(line: dict) -> dict:
        return {key: read(line[key]) for key, read in KEYS.items()}

    curves: dict[str, list] = {}
    with (folder / "curves.csv").open() as file:
        for line in csv.DictReader(file):
            losses = [float(line[column]) for column in ("train", *SCORED)]
            curves.setdefault(name_of(run_of(line)), []).append([int(line["step"]), *losses])
    with (folder / "runs.csv").open() as file:
        return [
            {"stage": line["stage"], "run": run_of(line)}
            | {key: int(line[key]) for key in ("steps", "skipped")}
            | {name: float(line[column]) for column, name in COLUMNS.items()}
            | {"curve": curves.get(name_of(run_of(line)), [])}
            for line in csv.DictReader(file)
        ]


class Study:
    """Trains the runs of the study and keeps their results in `runs.jsonl`."""

    def __init__(self, corpora: Path, output: Path, known: Path | None = None):
        self.corpora, self.file = corpora, output / "runs.jsonl"
        output.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        found = [*(read_results(known) if known else []), *map(json.loads, lines)]
        self.results = list({name_of(result["run"]): result for result in found}.values())
        dev, test = (Corpus(str(corpora / name)) for name in ("A", "test"))
        tokenizer = dev.tokenizer()
        self.special = tokenizer.special
        for name in "BCD":
            if Corpus(str(corpora / name)).manifest["tokenizer_sha256"] != dev.manifest["tokenizer_sha256"]:
                raise UserError(f"the corpora A and {name} have different tokenizers; see protocol.md")
        self.splits = {
            name: valid_rows(corpus.documents("valid"), 128, 0, self.special, tokenizer.token_bytes())
            for name, corpus in (("dev", dev), ("test", test))
        }

    def train(self, title: str, runs: list[dict], slots: int) -> None:
        """Trains the runs without a result."""
        done = {name_of(result["run"]) for result in self.results}
        missing = {name_of(run): run for run in runs if name_of(run) not in done}
        print(f"{title}: {len(runs)} runs, {len(missing)} to train", flush=True)
        if not missing:
            return
        configs = {name: config_of(run, self.corpora) for name, run in missing.items()}
        size = runs[0]["size"]  # all runs of a stage have one size
        started, steps = time.time(), 0
        total = sum(config.steps for config in configs.values())

        def progress(finished: int) -> None:
            print(f"{title}: {finished} of {total} steps, {time.time() - started:.0f} s", flush=True)

        results = train_together(
            configs,
            self.special,
            self.splits,
            SCORED,
            min(slots, len(missing)),
            SIZES[size][3] // POINTS,
            "dev",
            FLAGS.processes,
            FLAGS.capacity,
            progress,
        )
        with self.file.open("a") as file:
            for result in results:
                result = {"stage": title, "run": missing[result.pop("name")], **result}
                self.results.append(result)
                print(json.dumps(result), file=file, flush=True)
                steps += result["steps"]
        write_tables(self.results, self.file.parent)
        seconds = time.time() - started
        print(f"{title}: {steps} steps in {seconds:.0f} s on {jax.devices()[0].device_kind}", flush=True)


def main(_):
    known = Path(FLAGS.known) if FLAGS.known else None
    study, slots = Study(Path(FLAGS.corpora), Path(FLAGS.output), known), FLAGS.slots
    study.train("tune", [run for R in ALPHAS for run in tuning("plain", R, ALPHAS[R])], slots)
    chosen = choose(study.results)
    keys = {R: [f"plain,{R},{alpha}" for alpha in ALPHAS[R]] for R in ALPHAS}
    runs = confirming(chosen, keys[128], REPLICATES) + confirming(chosen, keys[32], REPLICATES[::2])
    for R, replicates in ((128, REPLICATES), (32, REPLICATES[::2])):
        best = chosen[f"plain,{R},{best_alpha(chosen, R, 'full')}"]["full"]["run"]
        runs += [best | {"corpus": c, "seed": s, "causal_weight": 2.0} for c, s in replicates]
    study.train("confirm", runs, slots)

    study.train("tune mir", tuning("mir", 128, [1.0]), min(slots, 24))
    mixtures = sorted({best_alpha(chosen, 128, kind) for kind in ("full", "stop")})
    study.train("tune dropout", tuning("dropout", 128, [*mixtures, 1.0]), slots)
    chosen = choose(study.results)
    # The tokens of half a run of MIR cost as much as all tokens of a causal run.
    same_compute = min(
        (
            r
            for r in study.results
            if r["stage"] == "tune mir" and r["run"]["length"] == 1 / 2  # on corpus A
        ),
        key=lambda result: result["dev/causal/loss"],
    )["run"]
    runs = confirming(chosen, ["mir,128,1.0"], REPLICATES)
    runs += [same_compute | {"corpus": corpus, "seed": seed} for corpus, seed in REPLICATES]
    study.train("confirm mir", list({name_of(run): run for run in runs}.values()), min(slots, 24))
    keys = [f"dropout,128,{alpha}" for alpha in [*mixtures, 1.0]]
    study.train("confirm dropout", confirming(chosen, keys, REPLICATES), slots)

    for size in SIZES:
        if size != "230k":
            keys = {f"plain,128,{alpha}" for alpha in (*mixtures, 1.0)}
            runs = [run | {"size": size} for run in confirming(chosen, sorted(keys), [("B", 1), ("C", 1)])]
            study.train(f"size {size}", runs, slots)

    study.train("tune more", MORE_TUNING, slots)
    chosen = choose(study.results)
    picked = [chosen[f"{recipe},128,{alpha}"]["stop"]["run"] for recipe, alpha in MORE]
    for run in picked:
        runs = [run | {"corpus": corpus, "seed": seed} for corpus, seed in REPLICATES]
        study.train(f"confirm {run['recipe']}", runs, slots)
    added = exploring(chosen)
    for recipe, size in dict.fromkeys((run["recipe"], run["size"]) for run in added):
        if recipe != "linear":  # trains alone, by the command in protocol.md
            runs = [run for run in added if (run["recipe"], run["size"]) == (recipe, size)]
            study.train("explore", runs, slots)


if __name__ == "__main__":
    flags.DEFINE_string("corpora", "runs/study", "Folder of the corpora A, B, C, D and test.")
    flags.DEFINE_string("output", "runs/study_results", "Folder of the results.")
    flags.DEFINE_string("known", "", "Folder of runs.csv and curves.csv whose runs are not trained again.")
    flags.DEFINE_integer("slots", 32, "Runs that train at the same time.")
    flags.DEFINE_integer("processes", 1, "Processes that read the data.")
    flags.DEFINE_integer("capacity", 0, "Steps of data on the device, at least; equal sizes compile once.")
    cli.run(main)
