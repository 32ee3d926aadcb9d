"""Runs fuzzing cases: damages a file of a target, and checks that it is read or rejected in one line."""

from __future__ import annotations

import collections
import contextlib
import signal
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from dualsm.process.errors import UserError, user_message
from tests.fuzzing.artifacts import Target
from tests.fuzzing.damage import damaged

SECONDS = 30  # time limit of a case


class Hang(BaseException):
    """A case exceeded the time limit. A BaseException, so that readers do not catch it."""


def fuzz(target: Target, cases: int, seed: int | None = None) -> collections.Counter:
    """Runs cases and counts the outcomes "read" and "rejected"; raises unexpected errors of the reader.

    Args:
      target: files to damage and read.
      cases: number of cases; fewer run if the target has fewer different cases.
      seed: seed of the cases; None: always the same cases.
    """
    first = next(iter(target.files))
    assert attempt(target, first, target.files[first]) == "read", "the undamaged files cannot be read"
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
    """Reads the target in a temporary folder, with other content in one of its files."""
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
            assert str(error).strip(), "the error has no message"
            return "rejected"
        except OSError as error:
            if not user_message(error):
                raise
            return "rejected"
        return "read"


@contextlib.contextmanager
def _limit(seconds: float):
    def ring(*_):
        raise Hang(f"not finished after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
