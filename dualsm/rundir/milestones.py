"""Milestones: checkpoints at the word counts at which the BabyLM challenge compares models."""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dualsm.data.corpus import Corpus
from dualsm.objectives.plan import MixturePlan
from dualsm.process.errors import UserError
from dualsm.process.output import write_atomically
from dualsm.process.paths import user_path
from dualsm.process.value_rules import parse_count

FILE = "milestones.json"  # step -> name
_TOLERANCE = 0.01  # a milestone may exceed the words of the run by this fraction, as steps are rounded


def find_milestones(config: ConfigDict, plan: MixturePlan, corpora: Sequence[Corpus]) -> dict[int, str]:
    """Returns the milestones of `config.checkpoint.at_words`, step -> name, such as {120: "1M"}.

    A milestone is the first step after which the model has been trained on at least its number of words.
    Tokens are converted to words by the mean number of words per token of each corpus.

    Args:
      config: the config.
      plan: the plan of the run.
      corpora: corpus of each source of the plan.

    Raises:
      UserError: if a milestone has more words than the run, two milestones are at the same step, or the
        manifest of the corpus lacks the number of words.
    """
    names = [name for name in config.checkpoint.at_words.split(",") if name]
    if not names:
        return {}
    words_per_sequence_K = [config.seq_len * _words_per_token(corpus) for corpus in corpora]

    def words_after(step: int) -> float:
        return float(np.dot(plan.source_sequences(step), words_per_sequence_K))

    total = words_after(config.steps)
    milestones = {}
    for name in names:
        if (words := parse_count(name)) > total * (1 + _TOLERANCE):
            raise UserError(
                f"config.checkpoint.at_words={name}: the run has only {total:,.0f} words; raise config.steps "
                "or remove the milestone"
            )
        steps = range(1, config.steps)
        step = 1 + bisect.bisect_left(steps, words, key=words_after)
        if step in milestones:
            raise UserError(
                f"config.checkpoint.at_words: {milestones[step]} and {name} are at the same step, {step}; "
                "leave one out or reduce config.batch_size"
            )
        milestones[step] = name
    return milestones


def _words_per_token(corpus: Corpus) -> float:
    split = corpus.manifest["splits"]["train"]
    if "words" not in split:
        raise UserError(
            f"config.checkpoint.at_words: the corpus {corpus.folder} was prepared by an earlier version of "
            "dualsm, which did not count words; prepare it again in another folder"
        )
    return split["words"] / split["tokens"]


def all_milestones(workdir: epath.Path, milestones: dict[int, str]) -> dict[int, str]:
    """Returns `milestones` and those that the run had before a change of `config.checkpoint.at_words`."""
    earlier = read_milestones(workdir) if (workdir / FILE).exists() else {}
    return dict(sorted((earlier | milestones).items()))


def write_milestones(workdir: epath.Path, milestones: dict[int, str]) -> None:
    """Writes the milestones into a run directory, if there are any."""
    if milestones:
        write_atomically(workdir / FILE, json.dumps(milestones, indent=1) + "\n")


def read_milestones(workdir: epath.PathLike) -> dict[int, str]:
    """Returns the milestones of a run, step -> name.

    Raises:
      UserError: if the run has none.
    """
    path = user_path(workdir) / FILE
    try:
        return {int(step): str(name) for step, name in json.loads(path.read_text()).items()}
    except OSError as error:
        raise UserError(
            f"{workdir} has no milestones ({FILE} is missing); train with config.checkpoint.at_words"
        ) from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
