"""Prompts from files, as token ids, and as text with visible masks."""

from __future__ import annotations

import re
from pathlib import Path

from dualsm.data.text import foreign_encoding, likely_encoding, parse_json, without_bom
from dualsm.data.tokenizer import RESERVED_IDS, Tokenizer
from dualsm.process.errors import UserError

_MASKS = re.compile(r"<mask(?::(\d+))?>")
_MOST_MASKS = 65536  # in one place
_HEAD_BYTES = 1 << 16


def read_prompts(path: str) -> list[str]:
    """Prompts from a file: .jsonl with a field `prompt`, or a prompt a line.

    Raises:
      UserError: with the line of what cannot be read.
    """
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"--prompts: cannot read {path}: {error}") from error
    if encoding := foreign_encoding(content[:_HEAD_BYTES]):
        raise UserError(f"--prompts: {path} is encoded in {encoding}; convert it to UTF-8")
    prompts = []
    for number, line in enumerate(map(without_bom, re.split(rb"\r\n?|\n", content)), 1):
        if line.strip():
            prompts.append(_prompt_of(line, path.endswith(".jsonl"), f"{path}, line {number}"))
    if not prompts:
        raise UserError(f"--prompts: {path} has no prompts")
    return prompts


def _prompt_of(line: bytes, is_json: bool, where: str) -> str:
    try:
        prompt = parse_json(line)["prompt"] if is_json else line.decode("utf-8", "surrogateescape")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: no JSON object with a field `prompt`") from error
    if not isinstance(prompt, str):
        raise UserError(f"{where}: the field `prompt` is no text")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = "lone surrogates" if line.isascii() else likely_encoding(line)
        raise UserError(f"{where}: no UTF-8, but {reason}") from error
    return prompt


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt with `<s>` in front; `<mask>` and `<mask:8>` become one and eight masks.

    Raises:
      UserError: for a text that is no Unicode, or too many masks.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError("a prompt is no valid Unicode: it holds half a surrogate pair") from error
    tokens, position = [tokenizer.special.bos], 0
    for match in _MASKS.finditer(prompt):
        tokens += tokenizer.encode([prompt[position : match.start()]], inside=position > 0)[0]
        tokens += [tokenizer.special.mask] * _count(match[1] or "1")
        position = match.end()
    return tokens + tokenizer.encode([prompt[position:]], inside=position > 0)[0]


def show(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Returns the text of token ids with its masks visible."""
    parts, run = [], []
    for token in tokens:
        if token >= RESERVED_IDS:
            run.append(token)
        elif token == tokenizer.special.mask:
            parts += [tokenizer.decode(run, inside=bool(parts)), "░"]
            run = []
    return "".join([*parts, tokenizer.decode(run, inside=bool(parts))])


def _count(digits: str) -> int:
    if len(digits) > len(str(_MOST_MASKS)) or int(digits) > _MOST_MASKS:
        raise UserError(f"<mask:{digits[:20]}>: at most {_MOST_MASKS} masks can stand in one place")
    return int(digits)
