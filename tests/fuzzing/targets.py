"""All fuzzing targets."""

from __future__ import annotations

from pathlib import Path

from tests.fuzzing import corpora, inputs, runs, settings, tasks
from tests.fuzzing.artifacts import Target, real_texts


def make_targets(scratch: Path) -> dict[str, Target]:
    """Returns all targets by name; builds their files in an empty folder."""
    texts = real_texts()
    corpus = corpora.make_corpus(scratch, texts)
    return {
        **corpora.targets(corpus, texts, scratch),
        **inputs.targets(),
        **tasks.targets(),
        **runs.targets(corpus, texts, scratch),
        **settings.targets(corpus, scratch),
    }
