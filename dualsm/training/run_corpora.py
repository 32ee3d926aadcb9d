"""The corpora of a run, one per source: opens them and orders their sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from dualsm.data.batches import OrderedDocuments
from dualsm.data.corpus import TOKENIZER, Corpus
from dualsm.data.sequence_order import SequenceOrder
from dualsm.data.tokenizer import Tokenizer
from dualsm.objectives.plan import MixturePlan
from dualsm.objectives.sources import Source, trained_sources
from dualsm.process import distributed
from dualsm.process.errors import UserError

_POLL_SECONDS = 1.0  # between checks whether the run was stopped


class RunCorpus(NamedTuple):
    """A source of a run and its corpus; a run without `config.sources` has one unnamed source."""

    source: Source
    corpus: Corpus


def open_corpora(config: ConfigDict) -> list[RunCorpus]:
    """Opens the corpora of a run in the order of `trained_sources`.

    Raises:
      UserError: if a corpus cannot be read, if its tokenizer differs from that of the first corpus, or if two
        sources have the same documents.
    """
    opened = [
        RunCorpus(source, Corpus(source.corpus, source.corpus_key)) for source in trained_sources(config)
    ]
    first, seen = opened[0], {}
    for source, corpus in opened:
        if (other := seen.setdefault(corpus.identity, source)) is not source:
            raise UserError(
                f"{other.corpus_key}={other.corpus} and {source.corpus_key}={source.corpus} are the same "
                "corpus; give one of the sources another corpus, or remove it"
            )
        if corpus.manifest["tokenizer_sha256"] != first.corpus.manifest["tokenizer_sha256"]:
            raise UserError(
                f"{source.corpus_key}={source.corpus} has another tokenizer than "
                f"{first.source.corpus_key}={first.source.corpus}; prepare it again with "
                f"--tokenizer={first.corpus.folder / TOKENIZER}"
            )
    return opened


def finish_verification(corpora: Sequence[RunCorpus], stop: Callable[[], bool]) -> bool:
    """Waits for the verification of all corpora, in all processes of a job, or until `stop`.

    Args:
      corpora: the corpora.
      stop: called about once per second; must return the same in all processes.

    Returns:
      True if `stop` returned True before the end of the verification.

    Raises:
      UserError: if a shard is damaged.
    """
    while True:
        with distributed.together():
            verified = all(corpus.finish_verification(_POLL_SECONDS) for _, corpus in corpora)
        if distributed.all_agree(verified):
            return False
        if stop():
            return True


def check_tokenizer(corpora: Sequence[RunCorpus], tokenizer: Tokenizer) -> None:
    """Raises `UserError` if a corpus was prepared with another tokenizer than that of a trained run."""
    for source, corpus in corpora:
        if corpus.manifest["tokenizer_sha256"] != tokenizer.sha256():
            raise UserError(
                f"the corpus {source.corpus} was prepared with another tokenizer than the run's; prepare it "
                "again with --tokenizer=WORKDIR/tokenizer.model"
            )


def order_documents(
    config: ConfigDict, corpora: Sequence[RunCorpus], plan: MixturePlan
) -> list[OrderedDocuments]:
    """Returns the training documents of each corpus and the order of their sequences.

    Raises:
      UserError: if a corpus has too few tokens, or a source too few sequences.
    """
    ordered = []
    for (source, corpus), sequences in zip(corpora, plan.source_sequences(config.steps), strict=True):
        documents, budget = corpus.documents("train"), sequences * config.seq_len
        if source.name:
            _check_source(source, sequences, config.seq_len, documents.tokens)
        order = SequenceOrder(
            documents.lengths,
            budget,
            config.seq_len,
            source.repetitions,
            config.seed,
            source.unique_tokens,
        )
        ordered.append(OrderedDocuments(documents, order))
    return ordered


def _check_source(source: Source, sequences: int, seq_len: int, available: int) -> None:
    """Raises `UserError` if a source in `config.sources` has too few sequences or tokens."""
    budget = sequences * seq_len
    if not sequences:
        raise UserError(f"{source.key}.share gives the source no sequence; raise it or config.steps")
    if source.repetitions > sequences:
        raise UserError(
            f"{source.key}.repetitions={source.repetitions} must not exceed the {sequences} sequences "
            "that the run reads from the source; lower it, or raise the share of the source or config.steps"
        )
    if source.unique_tokens > budget:
        raise UserError(
            f"{source.key}.unique_tokens={source.unique_tokens:,} must not exceed the {budget:,} tokens that "
            "the run reads from the source; lower it, or raise the share of the source or config.steps"
        )
    unique = source.unique(budget)
    if unique <= available:
        return
    too_few = f"{source.key}: the corpus {source.corpus} has {available:,} training tokens, but "
    if source.repetitions and available < seq_len:  # more repetitions would exceed the number of sequences
        raise UserError(
            f"{too_few}a sequence has config.seq_len={seq_len:,}; lower config.seq_len to {available:,} or "
            f"less, set its unique_tokens to {available:,} in place of repetitions, or prepare more text"
        )
    if source.repetitions:
        cause = f"{budget:,} tokens / {source.repetitions} repetitions"
        remedy = (
            f"raise its repetitions to {-(-budget // available)} or more, lower its share or config.steps"
        )
    else:
        cause, remedy = "its unique_tokens", f"lower them to {available:,} or less"
    raise UserError(
        f"{too_few}the source needs {unique:,} unique tokens ({cause}); {remedy}, or prepare more text"
    )
