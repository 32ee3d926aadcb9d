"""Special roles of tokens (BOS, mask, ...), which an import stores in `tokenizer.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from dualsm.data.tokenizer import RESERVED_IDS, SPECIAL_PIECES, SpecialIds

MAX_ID = (1 << 24) - 1  # bounds the size of arrays indexed by id
KEY = "dualsm"  # key in `tokenizer.json`; not standard, so exports remove it


@dataclasses.dataclass(frozen=True)
class SpecialRoles:
    """Special roles of the tokens of a `tokenizer.json`.

    Attributes:
      pieces: token by role; the tokens that the file lacks are added at its end. Roles may share a token,
        except that of the mask.
      num_ids: number of ids of the weights; ids without a token in the file are never used.
    """

    pieces: dict[str, str] = dataclasses.field(default_factory=lambda: dict(SPECIAL_PIECES))
    num_ids: int = 0

    @classmethod
    def pop_from(cls, content: dict) -> SpecialRoles:
        """Removes the roles from the content of a `tokenizer.json` and returns them, or the default.

        Raises:
          ValueError: if the roles are damaged.
        """
        if KEY not in content:
            return cls()
        section = content.pop(KEY)
        roles = cls(dict(section["special_tokens"]), section["num_ids"])
        pieces = list(roles.pieces.values())
        valid = roles.pieces.keys() == SPECIAL_PIECES.keys() and all(isinstance(p, str) and p for p in pieces)
        valid = valid and type(roles.num_ids) is int and 0 < roles.num_ids <= MAX_ID + 1
        if not valid or pieces.count(roles.pieces["mask"]) > 1:
            raise ValueError(f"its key {KEY} is damaged")
        return roles

    def write_to(self, content: dict) -> None:
        """Adds the roles to the content of a `tokenizer.json`."""
        content[KEY] = {"special_tokens": self.pieces, "num_ids": self.num_ids}

    def unused_ids(self, external_ids_V: np.ndarray, own_ids: Collection[int]) -> list[int]:
        """Returns the internal ids that occur neither in text nor at the end of a text.

        These are padding, tokens that the file lacks except `eos`, ids of the weights without a token, a mask
        that these roles name, and second ids of a token that has several roles.

        Args:
          external_ids_V: see `Tokenizer`.
          own_ids: external ids of the tokens in the file.
        """
        eos = SpecialIds().eos
        of_eos = external_ids_V[eos]
        found = []
        for token, external in enumerate(external_ids_V.tolist()):
            foreign = external not in own_ids and token != eos
            repeated = token < eos and external == of_eos
            named = self.num_ids and token == SpecialIds().mask
            if foreign or repeated or named:
                found.append(token)
        seen: dict[int, int] = {}
        for token in range(RESERVED_IDS):  # the first of several ids, except that of `eos`
            external = int(external_ids_V[token])
            if external >= 0 and external != of_eos and seen.setdefault(external, token) != token:
                found.append(token)
        return sorted(set(found))
