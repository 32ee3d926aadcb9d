"""Scores of a memorized text."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dualsm.config import default_config
from dualsm.devices import sharding
from dualsm.evaluation.modes import MODES, ScoringParams
from dualsm.evaluation.scoring import Scorer
from dualsm.objectives.example import SpecialIds

from .conftest import VOCABULARY


@pytest.mark.parametrize("mode", MODES)
def test_memorized_text_scores_above_its_corrupted_copies(memorized, mode):
    mesh = sharding.make_mesh(default_config().mesh, jax.devices()[:1])
    tokenizer = SimpleNamespace(special=SpecialIds())  # the inputs are token ids
    scorer = Scorer(memorized.config, memorized.params, tokenizer, mesh)
    text, rng = memorized.text[1:-1], np.random.default_rng(0)
    copies = []
    for place in rng.choice(np.arange(8, len(text)), 6, replace=False):
        other = (text[place] - 16 + rng.integers(1, VOCABULARY - 16)) % (VOCABULARY - 16) + 16
        copies.append([*text[:place], int(other), *text[place + 1 :]])
    pairs = [(each[:8], each[8:]) for each in (text, *copies)]
    scoring = ScoringParams(mode, masks=(1, 4), samples=32)
    right, *wrong = scorer.score_tokens(pairs, scoring, quiet=True).log_likelihood_N
    assert right > max(wrong) + 1
