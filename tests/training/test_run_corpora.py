"""Corpora of a run that are too small."""

from types import SimpleNamespace

import numpy as np
import pytest

from dualsm.config import check_config
from dualsm.data.document_lengths import DocumentLengths
from dualsm.objectives.plan import MixturePlan
from dualsm.objectives.sources import trained_sources
from dualsm.process.errors import UserError
from dualsm.training.run_corpora import RunCorpus, order_documents
from tests.micro_sources import two_sources

TOKENS = {"small": 20, "large": 100_000}


def ordered(config):
    """Returns the order of the documents of sources with `TOKENS` tokens."""
    check_config(config)
    corpora = []
    for source in trained_sources(config):
        lengths = DocumentLengths.from_array(np.full(TOKENS[source.name] // 10, 10, np.int32))
        documents = SimpleNamespace(tokens=TOKENS[source.name], lengths=lengths)
        corpus = SimpleNamespace(documents=lambda split, documents=documents: documents)
        corpora.append(RunCorpus(source, corpus))
    return order_documents(config, corpora, MixturePlan(config))


def test_a_source_with_fewer_tokens_than_a_sequence_raises_with_advice_that_works():
    config = two_sources()
    expected = (
        r"^config.sources.small: the corpus small has 20 training tokens, but a sequence has "
        rf"config.seq_len={config.seq_len}; lower config.seq_len to 20 or less, set its unique_tokens to "
        "20 in place of repetitions, or prepare more text$"
    )
    with pytest.raises(UserError, match=expected):
        ordered(config)
    config.sources.small.update(repetitions=0, unique_tokens=20.0)
    order = ordered(config)[1].order
    segments = order.segments(np.arange(order.num_sequences))
    assert set(segments.document_S.tolist()) == {0, 1}
    config.seq_len = 20
    config.sources.small.update(repetitions=MixturePlan(config).source_sequences(config.steps)[1])
    config.sources.small.unique_tokens = 0.0
    assert ordered(config)[1].order.unique == 20
