"""Prompts from held-out documents, to measure generation."""

from __future__ import annotations

import numpy as np

from dualsm.evaluation.held_out import open_held_out
from dualsm.rundir.trained_run import TrainedRun


def held_out_prompts(run: TrainedRun, data: str, count: int, tokens: int) -> list[list[int]]:
    """Returns segments of held-out documents, spread evenly over the documents, as prompts.

    Args:
      run: the run.
      data: path of a corpus; empty for the corpora that the run was trained on, of which the first is used.
      count: number of prompts.
      tokens: tokens per prompt.

    Raises:
      UserError: if the corpus cannot be read.
    """
    documents = open_held_out(run, data)[0].corpus.documents("valid")
    document_N = np.flatnonzero(documents.lengths_N > tokens)
    chosen_S = document_N[np.arange(count) * len(document_N) // count]
    rng = np.random.default_rng(0)
    start_S = rng.integers(0, documents.lengths_N[chosen_S] - tokens)
    return [text.tolist() for text in documents.read(chosen_S, start_S, start_S + tokens)]
