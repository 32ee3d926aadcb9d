"""The error for corpora with missing, damaged or replaced files."""

from __future__ import annotations

from dualsm.process.errors import UserError


class DamagedCorpus(UserError):
    """Raised for a missing, damaged or replaced file of a corpus.

    `prepare` raises an error for a damaged `--output`, so the advice is to remove the folder first.

    Attributes:
      damage: the message without the advice.
    """

    def __init__(self, damage: str):
        super().__init__(damage)
        self.damage = damage

    def __str__(self) -> str:
        return f"{self.damage}; copy the corpus again, or remove its folder and prepare it again"
