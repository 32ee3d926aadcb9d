"""One case after another: damage an artefact, read it, and see that it was read or refused in one line."""

from __future__ import annotations

import collections
import contextlib
import signal
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from dualsm.process.errors import UserError, explained
from tests.fuzzing.artefacts import Target
from tests.fuzzing.damage import damaged

SECONDS = 30  # a case may take


class Hang(BaseException):
    """A case did not end in time. No Exception, so that no reader takes it for its own."""


def fuzz(target: Target, cases: int, seed: int | None = None) -> collections.Counter:
    """Counts the outcomes of so many cases: "read" or "refused". Raises what a reader should not.

    Args:
      target: what to damage and read.
      cases: how many; small ones come in fewer where there is not as much to damage.
      seed: of the cases; None takes the same ones every time.
    """
    first = next(iter(target.files))
    assert attempt(target, first, target.files[first]) == "read", "the whole artefact is not even read"
    outcomes: collections.Counter = collections.Counter()

    @settings(
        max_examples=cases, database=None, deadline=None, derandomize=seed is None,
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def case(data):
        name = data.draw(st.sampled_from(sorted(target.files)), label="file")
        kind = damaged(target.files[name]) if target.content is None else target.content
        content = data.draw(kind, label="content")
        outcomes[attempt(target, name, content)] += 1

    (case if seed is None else seeded(seed)(case))()
    return outcomes


def attempt(target: Target, name: str, content: bytes | None) -> str:
    """Reads the artefact with other content in one of its files, in a folder of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "it"
        for path, whole in target.files.items():
            found = content if path == name else whole
            if found is not None:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(found)
        folder.mkdir(exist_ok=True)
        try:
            with _limit(SECONDS):
                target.use(folder)
        except UserError as error:
            assert str(error).strip(), "a mistake without a word"
            return "refused"
        except OSError as error:
            if not explained(error):
                raise
            return "refused"
        return "read"


@contextlib.contextmanager
def _limit(seconds: float):
    def ring(*_):
        raise Hang(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
