"""Writes unigram.csv: the held-out loss of a unigram model of each training corpus, in nats per token.

python docs/reproduction/unigram.py --corpora=runs/study

protocol.md has the commands that make the corpora.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from dualsm.data.corpus import Corpus
from dualsm.evaluation.baselines import unigram_log_probs
from dualsm.process import cli


def held_out_loss(train: Corpus, held_out: Corpus) -> float:
    """Returns the loss of the token frequencies of `train` on the held-out text, as in causal training.

    The first token of a document, `<s>`, is not a target.
    """
    documents = held_out.documents("valid")
    targets = np.concatenate([tokens[1:] for tokens in documents.read(range(len(documents)))])
    return float(-unigram_log_probs(train)[targets].mean())


def main(_: Sequence[str]) -> None:
    folder = Path(flags.FLAGS.corpora)
    corpora = {name: Corpus(str(folder / name)) for name in ("A", "B", "C", "D", "test")}
    with Path(__file__).with_name("unigram.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["corpus", "dev", "test"])
        for name in "ABCD":
            losses = (held_out_loss(corpora[name], corpora[split]) for split in ("A", "test"))
            writer.writerow([name, *(f"{loss:.4f}" for loss in losses)])


if __name__ == "__main__":
    cli.DEFINE_path("corpora", None, "folder of A, B, C, D and test")
    flags.mark_flag_as_required("corpora")
    cli.run(main)
