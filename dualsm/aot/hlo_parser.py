"""Parser for the text of HLO modules."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    """One instruction of an HLO computation.

    Attributes:
      name: name without "%".
      type: type of the result, such as "bf16[8,128]{1,0}" or a tuple of types.
      op: opcode: "convolution", "fusion", ...
      arguments: text between the parentheses.
      attributes: text after the parentheses.
      root: True if the instruction returns the result of its computation.
    """

    name: str
    type: str
    op: str
    arguments: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.arguments)


def parse_module(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Parses a module.

    Args:
      text: text of an HLO module, from `compiled.as_text()`.

    Returns:
      The instructions of each computation by its name, and the name of the entry computation.
    """
    computations, current, entry = {}, None, ""
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (start := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
            current.append(_instruction(line[start.end() :], start[2], bool(start[1])))
    return computations, entry


def _instruction(text: str, name: str, root: bool) -> Instruction:
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    type_, text = text[:end], text[end:].lstrip()
    op, text = text.split("(", 1)
    end = _closing("(" + text) - 1
    return Instruction(name, type_, op, text[:end], text[end + 1 :], root)


def _closing(text: str) -> int:
    """Returns the index of the parenthesis that closes the one at the start of `text`."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return index
    return len(text)


def parse_arrays(type_: str) -> list[tuple[tuple[int, ...], float, bool]]:
    """Parses the arrays in a type.

    Returns:
      (shape, size in bytes, True if the array is in main memory) of each array.
    """
    arrays = []
    for element, shape, layout in _ARRAY.findall(type_):
        sizes = tuple(int(size) for size in shape.split(",") if size)
        arrays.append((sizes, math.prod(sizes) * _BYTES.get(element, 1), "S(" not in layout))
    return arrays


def bytes_in_hbm(type_: str) -> float:
    """Returns the bytes of the arrays in a type that are in main memory."""
    return sum(size for _, size, hbm in parse_arrays(type_) if hbm)
