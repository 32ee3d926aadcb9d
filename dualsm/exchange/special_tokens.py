"""Special tokens of a Hugging Face model folder, and tokens that the import adds.

Documents begin with BOS and end with EOS, and masked objectives need a mask. Models of transformers name the
ids of BOS, EOS and PAD in their config files, and causal models have no mask.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dualsm.data.special_roles import SpecialRoles
from dualsm.data.tokenizer import SPECIAL_PIECES
from dualsm.data.tokenizer_json import JsonTokenizer
from dualsm.exchange.weight_files import read_json_object
from dualsm.process.errors import UserError

_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")  # in order of precedence
_ROLES = ("bos", "eos", "pad", "unk", "mask")
_GROWS = ("bos", "eos", "mask")  # the other roles share the token of EOS if they have none


class AdaptedTokenizer(NamedTuple):
    """A tokenizer with all special roles, and messages for the user about them."""

    tokenizer: JsonTokenizer
    messages: list[str]


def adapt_tokenizer(folder: Path, path: Path, num_ids: int, mask_token: str = "") -> AdaptedTokenizer:
    """Loads a `tokenizer.json` and gives each special role a token.

    Args:
      folder: model folder, with the config files that name the ids of special tokens.
      path: the `tokenizer.json`.
      num_ids: rows of the embedding.
      mask_token: existing token to use as the mask; empty: that of the config files, else `<mask>`.

    Returns:
      The tokenizer. Its `model` is the file itself if the file has all special tokens with dualsm's names,
      else the file with a description of the roles, see `SpecialRoles`.

    Raises:
      UserError: if the file is not a tokenizer, `mask_token` is not in it, it has more tokens than the
        embedding has rows, or the config files name ids that do not exist.
    """
    content = _read_tokenizer(path)
    token_of_id = _tokens(content)
    if not token_of_id:
        return AdaptedTokenizer(_load(path.read_bytes(), path), [])  # reports the damage
    if max(token_of_id, default=-1) >= num_ids:
        raise UserError(
            f"tokenizer {path} has ids up to {max(token_of_id)} but the embedding has {num_ids} rows; "
            "pass the tokenizer that belongs to the weights"
        )
    pieces, messages = _pieces(folder, token_of_id, mask_token)
    complete = set(pieces.values()) <= set(token_of_id.values()) and len(token_of_id) == num_ids
    if pieces == SPECIAL_PIECES and complete and not messages:
        return AdaptedTokenizer(_load(path.read_bytes(), path), [])
    SpecialRoles(pieces, num_ids).write_to(content)
    tokenizer = _load(json.dumps(content, ensure_ascii=False).encode(), path)
    for role in ("bos", "eos", "mask"):
        token = int(tokenizer.external_ids_V[getattr(tokenizer.special, role)])
        if pieces[role] not in token_of_id.values():
            how = "takes the unused id" if token < num_ids else "is added with the id"
            messages.append(f"{role}: {pieces[role]} {how} {token}")
        else:
            messages.append(f"{role}: {pieces[role]} (id {token})")
    unused = len(set(range(num_ids)) - token_of_id.keys())
    if unused:
        messages.append(f"{unused} ids of the weights have no token and are never predicted")
    return AdaptedTokenizer(tokenizer, messages)


def _load(model: bytes, path: Path) -> JsonTokenizer:
    try:
        return JsonTokenizer(model)
    except UserError as error:
        raise UserError(f"tokenizer {path}: {error}") from error


def _read_tokenizer(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except OSError as error:
        raise UserError(f"cannot read tokenizer {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"tokenizer {path}: not a tokenizer.json ({error})") from error
    return content


def _tokens(content: dict) -> dict[int, str]:
    """Returns the token of each id in a `tokenizer.json`; {} if the file is damaged."""
    try:
        vocab = content["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram: pairs of token and score
            vocab = {entry[0]: token for token, entry in enumerate(vocab)}
        found = {int(token): str(piece) for piece, token in vocab.items()}
        return found | {
            int(added["id"]): str(added["content"]) for added in content.get("added_tokens") or ()
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return {}  # `JsonTokenizer` reports the damage


def _pieces(
    folder: Path, token_of_id: Mapping[int, str], mask_token: str
) -> tuple[dict[str, str], list[str]]:
    """Returns the token of each role, and messages about contradictions."""
    known = set(token_of_id.values())
    files = {name: read_json_object(folder / name) for name in _FILES if (folder / name).is_file()}
    pieces, messages = {}, []
    for role in _ROLES:
        found = {}
        for name, content in files.items():
            token = _token(content, role, token_of_id, folder / name)
            if token is not None:
                found[name] = token
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{token} in {name}" for name, token in found.items())
            messages.append(f"{role}: {listed}; the first one is used")
        default = SPECIAL_PIECES[role]
        pieces[role] = next(iter(found.values()), default if default in known or role in _GROWS else "")
    if mask_token:
        if mask_token not in known:
            raise UserError(f"--mask_token={mask_token!r} is not in the tokenizer; name one of its tokens")
        pieces["mask"] = mask_token
    if pieces["mask"] in [piece for role, piece in pieces.items() if role != "mask"]:
        raise UserError(
            f"the mask {pieces['mask']!r} is also another special token; choose another --mask_token"
        )
    return {role: piece or pieces["eos"] for role, piece in pieces.items()}, messages


def _token(content: Mapping[str, Any], role: str, token_of_id: Mapping[int, str], path: Path) -> str | None:
    """Returns the token of a role in a config file, or None."""
    token = content.get(f"{role}_token_id")
    if isinstance(token, list):  # several ends of a text
        token = token[0] if token else None
    if token is not None:
        if type(token) is not int or token not in token_of_id:
            raise UserError(f"{path}: {role}_token_id={token!r} is not an id of the tokenizer; fix the file")
        return token_of_id[token]
    piece = content.get(f"{role}_token")
    piece = piece.get("content") if isinstance(piece, dict) else piece
    if not isinstance(piece, str):
        return None
    return piece if piece in token_of_id.values() else None
