"""Documents that cannot be used, and the kinds of their faults."""

from __future__ import annotations

FAULTS = ("bad_json", "bad_csv", "no_text", "invalid_utf8", "empty_text", "too_long", "unknown_id")


class Fault(ValueError):
    """Raised for documents that cannot be used.

    Attributes:
      kind: one of `FAULTS`.
      detail: description, or "".
      documents: number of documents; several if an unpaired quotation mark joins them.
    """

    def __init__(self, kind: str, detail: str = "", documents: int = 1):
        super().__init__(kind, detail, documents)  # with which a worker process pickles the error
        self.kind, self.detail, self.documents = kind, detail, documents

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind
