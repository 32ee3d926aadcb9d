"""Errors of the analysis: too few cells, or a missing package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dualsm.process.errors import UserError


class TooFewCells(UserError):
    """The table has too few finished cells for the analysis."""


@contextlib.contextmanager
def analysis_extra() -> Iterator[None]:
    """Raises `UserError` if an import in its block fails because a package is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; run pip install 'dualsm[analysis]'") from error
