"""What can keep a sweep from being analysed, and how it is said."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dualsm.process.errors import UserError


class TooFewCells(UserError):
    """A table has not, or not yet, the cells that were asked for."""


@contextlib.contextmanager
def analysis_extra() -> Iterator[None]:
    """Around imports of scikit-learn and matplotlib: raises `UserError` when one is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'dualsm[analysis]'") from error
