"""Documents that cannot be used, and the kinds of their faults."""

from __future__ import annotations

FAULTS = ("bad_json", "bad_csv", "no_text", "invalid_utf8", "empty_text", "too_long", "unknown_id")


class Fault(ValueError):
    """Raised for a document that cannot be used; `kind` is one of `FAULTS`."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)  # the arguments, with which a worker process pickles the error
        self.kind, self.detail = kind, detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind
