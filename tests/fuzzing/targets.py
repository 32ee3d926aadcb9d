"""Everything that is fuzzed."""

from __future__ import annotations

from pathlib import Path

from tests.fuzzing import corpora, inputs, runs, settings, tasks
from tests.fuzzing.artefacts import Target, real_texts


def make_targets(scratch: Path) -> dict[str, Target]:
    """All targets by name; what they are made from is built in an empty folder."""
    texts = real_texts()
    corpus = corpora.make_corpus(scratch, texts)
    return {
        **corpora.targets(corpus, texts, scratch),
        **inputs.targets(),
        **tasks.targets(),
        **runs.targets(corpus, texts, scratch),
        **settings.targets(corpus, scratch),
    }
