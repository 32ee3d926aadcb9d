"""Prompts: reading files, encoding with masks, and displaying masks."""

from __future__ import annotations

import re

from dualsm.data.text import foreign_encoding, likely_encoding, parse_json, without_bom
from dualsm.data.tokenizer import RESERVED_IDS, Tokenizer
from dualsm.process.errors import UserError
from dualsm.process.paths import user_path

_MASKS = re.compile(r"<mask(?::(\d+))?>")
_MAX_MASKS = 65536  # per placeholder
_HEAD_BYTES = 1 << 16


def read_prompts(path: str) -> list[str]:
    """Reads prompts from a file: .jsonl with a field `prompt`, or text with one prompt per line.

    Raises:
      UserError: if the file or one of its lines cannot be read.
    """
    try:
        content = user_path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--prompts: cannot read {path}: {error}") from error
    if encoding := foreign_encoding(content[:_HEAD_BYTES]):
        raise UserError(f"--prompts: {path} is encoded in {encoding}; convert it to UTF-8")
    prompts = []
    for number, line in enumerate(map(without_bom, re.split(rb"\r\n?|\n", content)), 1):
        if line.strip():
            prompts.append(_parse_prompt(line, path.endswith(".jsonl"), f"{path}, line {number}"))
    if not prompts:
        raise UserError(f"--prompts: {path} is empty; write one prompt per line")
    return prompts


def _parse_prompt(line: bytes, is_json: bool, where: str) -> str:
    try:
        prompt = parse_json(line)["prompt"] if is_json else line.decode("utf-8", "surrogateescape")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: not a JSON object with a field `prompt`") from error
    if not isinstance(prompt, str):
        raise UserError(f"{where}: the field `prompt` is not a string")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        if line.isascii():
            raise UserError(f"{where}: the prompt contains lone surrogates; remove them") from error
        encoding = likely_encoding(line)
        raise UserError(f"{where}: not UTF-8, but {encoding}; convert the file to UTF-8") from error
    return prompt


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns the token ids of a prompt, `<s>` first; `<mask>` and `<mask:8>` become one and eight masks.

    Raises:
      UserError: if the prompt is not valid Unicode or has too many masks.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError("a prompt is not valid Unicode: it contains a lone surrogate; remove it") from error
    tokens, position = [tokenizer.special.bos], 0
    for match in _MASKS.finditer(prompt):
        tokens += tokenizer.encode([prompt[position : match.start()]], inside=position > 0)[0]
        tokens += [tokenizer.special.mask] * _parse_count(match[1] or "1")
        position = match.end()
    return tokens + tokenizer.encode([prompt[position:]], inside=position > 0)[0]


def show(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Decodes token ids; each mask becomes `░`."""
    parts, run = [], []
    for token in tokens:
        if token >= RESERVED_IDS:
            run.append(token)
        elif token == tokenizer.special.mask:
            parts += [tokenizer.decode(run, inside=bool(parts)), "░"]
            run = []
    return "".join([*parts, tokenizer.decode(run, inside=bool(parts))])


def _parse_count(digits: str) -> int:
    if len(digits) > len(str(_MAX_MASKS)) or int(digits) > _MAX_MASKS:
        raise UserError(
            f"<mask:{digits[:20]}>: at most {_MAX_MASKS} masks are supported in one place; use fewer"
        )
    return int(digits)
