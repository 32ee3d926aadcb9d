"""Measures the acceptance of drafts for all runs in a folder, and adds them to acceptance.csv.

    python docs/decoding/acceptance.py runs/acceptance

One line per run, number K of tokens per draft, and sampling. `accepted` counts the first token, which is
always accepted; `second` and `third` are the probabilities that at least two and three tokens are accepted.
The losses are those of the whole held-out text, in nats per token.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from dualsm.evaluation.acceptance import SAMPLINGS, evaluate_acceptance
from dualsm.evaluation.held_out import evaluate_held_out, open_held_out
from dualsm.rundir.trained_run import open_run

TABLE = Path(__file__).with_name("acceptance.csv")
DRAFTS = (2, 4, 8, 16)


def measure(workdir: Path) -> pd.DataFrame:
    """Returns the lines of one run."""
    run = open_run(workdir)
    corpora = open_held_out(run)
    documents = [corpus.documents("valid") for _, corpus in corpora]
    losses = dict(evaluate_held_out(run, corpora, ("causal", "masked_diffusion"), 1))
    lines = []
    for draft in DRAFTS:
        found = evaluate_acceptance(run, documents, draft)
        for sampling in SAMPLINGS:
            probability_P = [*found[sampling]["by_position"], float("nan")]  # no third token at K = 2
            lines.append(
                {
                    "alpha": run.config.mixture.causal,
                    "repetitions": run.config.repetitions,
                    "weight_decay": run.config.optimizer.weight_decay,
                    "causal_loss": losses["causal"]["nats_per_token"],
                    "masked_loss": losses["masked_diffusion"]["nats_per_token"],
                    "draft": draft,
                    "sampling": sampling,
                    "accepted": found[sampling]["accepted_per_draft"],
                    "stderr": found[sampling]["stderr"],
                    "second": probability_P[1],
                    "third": probability_P[2],
                }
            )
    return pd.DataFrame(lines)


def main(folder: Path) -> None:
    tables = []
    for workdir in sorted(path.parent for path in folder.glob("*/config.json")):
        tables.append(measure(workdir))
        print(f"{workdir}\n{tables[-1].to_string(index=False)}", flush=True)
    table, keys = pd.concat(tables), ["alpha", "repetitions"]
    if TABLE.exists():
        known = pd.read_csv(TABLE)
        measured = known.set_index(keys).index.isin(table.set_index(keys).index)
        table = pd.concat([known[~measured], table])
    table = table.sort_values(["repetitions", "alpha"], ascending=[False, True], kind="stable")
    table.to_csv(TABLE, index=False, float_format="%.8g")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
