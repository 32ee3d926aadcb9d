"""Baselines for tasks: scores of an untrained model and of a unigram model of the training text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from dualsm.config import freeze
from dualsm.data.corpus import Corpus
from dualsm.data.tokenizer import Tokenizer
from dualsm.evaluation.modes import ScoringParams
from dualsm.evaluation.scoring import Item, Scorer, Scores, encode_pair
from dualsm.model.transformer import init_params
from dualsm.objectives.plan import MixturePlan
from dualsm.process.errors import UserError
from dualsm.process.progress import warn
from dualsm.rundir.trained_run import TrainedRun
from dualsm.training.run_corpora import check_tokenizer, open_corpora

UNTRAINED, UNIGRAM = "untrained", "unigram"
BASELINES = (UNTRAINED, UNIGRAM)
_MAX_TOKENS = 20_000_000  # tokens of the corpus that are counted
_DOCUMENTS_PER_READ = 256

# Scores items as `Scorer` does.
ScoreItems = Callable[[Sequence[Item], ScoringParams, str], Scores]


def open_baselines(names: Sequence[str], run: TrainedRun) -> dict[str, ScoreItems]:
    """Returns the baselines of a run by name.

    Args:
      names: names from `BASELINES`.
      run: the run.

    Raises:
      UserError: if "unigram" is named and a corpus of the run cannot be read.
    """
    makers = {
        UNTRAINED: lambda: untrained_scorer(run),
        UNIGRAM: lambda: UnigramScorer(training_log_probs(run), run.tokenizer),
    }
    return {name: makers[name]() for name in names}


def default_baselines(run: TrainedRun) -> tuple[str, ...]:
    """Returns all baselines; without "unigram", after a warning, if a corpus of the run cannot be used."""
    try:
        check_tokenizer(open_corpora(run.config), run.tokenizer)
    except UserError as error:
        warn(f"no unigram baseline: {error}")
        return (UNTRAINED,)
    return BASELINES


def untrained_scorer(run: TrainedRun) -> Scorer:
    """Returns the scorer of the run's model before training."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.params)
    init = jax.jit(lambda key: init_params(run.config.model, key), out_shardings=shardings)
    params = init(jax.random.key(run.config.seed))
    return Scorer(freeze(run.config.model), params, run.tokenizer, run.mesh)


def training_log_probs(run: TrainedRun) -> np.ndarray:
    """Returns the log-probability of each token id in the training text of a run, in nats, float64 [V].

    Raises:
      UserError: if a corpus of the run cannot be read, or has another tokenizer than the run.
    """
    corpora = open_corpora(run.config)
    check_tokenizer(corpora, run.tokenizer)
    log_prob_KxV = np.stack([unigram_log_probs(corpus) for _, corpus in corpora])
    sequences_K = np.array(MixturePlan(run.config).source_sequences(run.config.steps))
    return np.log(sequences_K / sequences_K.sum() @ np.exp(log_prob_KxV))


def unigram_log_probs(corpus: Corpus, max_tokens: int = _MAX_TOKENS) -> np.ndarray:
    """Returns the log-probability of each token id in the training text, in nats, float64 [V].

    Counts are increased by one (Laplace smoothing), so that unseen ids have a probability.

    Args:
      corpus: the corpus; its first documents, a random sample, are read.
      max_tokens: stop after this number of tokens.
    """
    documents = corpus.documents("train")
    count_V = np.ones(corpus.vocab_size)
    for start in range(0, len(documents), _DOCUMENTS_PER_READ):
        chunk = range(start, min(start + _DOCUMENTS_PER_READ, len(documents)))
        tokens = np.concatenate(documents.read(chunk))
        count_V += np.bincount(tokens, minlength=corpus.vocab_size)
        if count_V.sum() - corpus.vocab_size >= max_tokens:
            break
    return np.log(count_V / count_V.sum())


class UnigramScorer:
    """Scores a completion by the frequencies of its tokens, in every mode; ignores the context."""

    def __init__(self, log_prob_V: np.ndarray, tokenizer: Tokenizer):
        """
        Args:
          log_prob_V: log-probability of each token id, in nats.
          tokenizer: the model's tokenizer.
        """
        self._log_prob_V, self._tokenizer = log_prob_V, tokenizer

    def __call__(self, items: Sequence[Item], scoring: ScoringParams, label: str = "") -> Scores:
        """Returns the scores of the items, none of them NaN: completions of any length have a score."""
        completions = [encode_pair(self._tokenizer, item)[1] for item in items]
        log_likelihood_N = np.array([self._log_prob_V[completion].sum() for completion in completions])
        is_false_N = np.zeros(len(items), bool)
        tokens_N = np.array([len(completion) for completion in completions], int)
        return Scores(log_likelihood_N, is_false_N, tokens_N, is_false_N, 0)
