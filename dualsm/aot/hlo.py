"""FLOPs, memory traffic and collectives per device of a compiled program, from its HLO text.

XLA's cost analysis counts the body of a loop once; this module multiplies it by the number of iterations. The
loops of a training step (gradient accumulation, layers, chunks of logits) count from 0 to a constant.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

MATRIX_UNIT = 128  # rows and columns of the matrix unit of TPUs up to v5

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
# Attention kernels: splash is identified by the instruction's name, flash by its attributes. The table lists
# the number of matrix products of the size of the scores in each kernel.
_SPLASH = re.compile(r"splash_mha_(fwd|dq|dkv)")
_FLASH = re.compile(r'name = "flash_(forward|backward_queries|backward_keys)"')
_KERNEL_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "forward": 2, "backward_queries": 3, "backward_keys": 4}
_KERNEL_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton")
# Matrix products in library calls, such as "__cublas$gemm" and "__cublas$lt$matmul$f8".
_GEMM = re.compile(r'custom_call_target="__cublas\$(gemm|lt\$matmul)')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_MOVES_NOTHING = (
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "call", "conditional",
    "after-all", "iota", "partition-id", "replica-id", "opt-barrier",
)  # fmt: skip


class Instruction(NamedTuple):
    """One line of HLO.

    Attributes:
      name: name without "%".
      type: text such as "bf16[8,128]{1,0}", or a tuple of such.
      op: "convolution", "fusion", ...
      inside: text between the parentheses.
      rest: text of the attributes after the parentheses.
      root: True for the result of its computation.
    """

    name: str
    type: str
    op: str
    inside: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Returns the names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.inside)


class Work(NamedTuple):
    """Work of one device in one execution of a program.

    Attributes:
      flops: FLOPs of matrix products, two per multiply-add; in attention kernels including padding of small
        heads.
      hbm_bytes: estimated main memory traffic: every fusion and kernel reads its operands and writes its
        results once.
      collective_bytes: bytes that a device sends on a ring by kind: n-1 of n parts for all-gather,
        reduce-scatter and all-to-all, twice that for all-reduce, all for collective-permute.
      collective_count: number of executions by kind.
    """

    flops: float
    hbm_bytes: float
    collective_bytes: dict[str, float]
    collective_count: dict[str, float]


def analyse(text: str, devices: int, walked: float = 1.0) -> Work:
    """Computes the work of a compiled program.

    Args:
      text: text of the optimised module, from `compiled.as_text()`.
      devices: number of devices in the mesh; used as group size where the text has none.
      walked: fraction of the blocks of scores that attention kernels do not skip, which is not recoverable
        from the HLO text.
    """
    computations, entry = _parse(text)
    times, fused = _times(computations, entry)
    flops = hbm_bytes = 0.0
    collectives = {}
    for name, instructions in computations.items():
        if not times[name]:
            continue
        types = {i.name: i.type for i in instructions}
        for i in instructions:
            if i.op in ("convolution", "dot") or _GEMM.search(i.rest):
                flops += times[name] * _product_flops(i, types)
            if kernel := _SPLASH.match(i.name):
                flops += times[name] * walked * _KERNEL_PRODUCTS[kernel[1]] * _splash_product(i, types)
            if i.op == "custom-call" and (kernel := _FLASH.search(i.rest)):
                flops += times[name] * walked * _KERNEL_PRODUCTS[kernel[1]] * _flash_product(i, types)
            kind = i.op.removesuffix("-start")
            if kind in COLLECTIVES:
                # An overlapped collective appears in every fusion of its chain.
                chain = re.search(r'chain_id="(\d+)"', i.rest)
                collectives[kind, chain[1] if chain else i.name] = times[name], _sent(i, devices)
            elif name not in fused and i.op not in _MOVES_NOTHING and not i.op.endswith("-done"):
                hbm_bytes += times[name] * _traffic(i, types, computations)
    sent, count = defaultdict(float), defaultdict(float)
    for (kind, _), (often, size) in collectives.items():
        sent[kind] += often * size
        count[kind] += often
    return Work(flops, hbm_bytes, dict(sent), dict(count))


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the computations by name, and the name of the entry computation."""
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
    """Where the parenthesis that opens `text` closes."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return place
    return len(text)


def _times(computations: dict, entry: str) -> tuple[dict[str, float], set[str]]:
    """How often each computation runs, and which are the inside of a fusion."""
    times, fused = defaultdict(float), set()

    def visit(name: str, often: float) -> None:
        times[name] += often
        for i in computations.get(name, ()):
            called = _CALLED.findall(i.rest)
            if i.op == "fusion":
                fused.update(called)
            if i.op == "while":
                condition, body = (re.search(rf"{k}=%?([\w.\-]+)", i.rest)[1] for k in ("condition", "body"))
                often_inside = often * _trips(computations[condition], computations[body], i.rest)
                called = [body]
            elif i.op == "conditional":
                often_inside = often
                branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
                called = re.findall(r"[\w.\-]+", branches[1]) if branches else _BRANCHES.findall(i.rest)
            elif i.op in ("fusion", "call") or i.op.startswith("async"):
                often_inside = often
            else:
                continue  # what reduces, compares or sorts: no work to speak of
            for inside in called:
                visit(inside, often_inside)

    visit(entry, 1.0)
    return times, fused


def _trips(condition: list[Instruction], body: list[Instruction], rest: str) -> int:
    """How often a loop's body runs: what it says, or else its counter's limit over its counter's step."""
    if known := re.search(r"known_trip_count[^\d]*(\d+)", rest):
        return int(known[1])
    limits = [
        int(i.inside) for i in condition if i.op == "constant" and i.type.startswith(("s32[]", "u32[]"))
    ]
    counters = [i for i in condition if i.op == "get-tuple-element" and i.type.startswith(("s32[]", "u32[]"))]
    if not limits or not counters:
        return 1
    place = int(re.search(r"index=(\d+)", counters[0].rest)[1])
    named = {i.name: i for i in body}
    result = next(i for i in body if i.root)
    last = named.get(result.operands[place]) if result.op == "tuple" else None
    steps = [named[name] for name in last.operands if name in named] if last and last.op == "add" else []
    step = next((int(i.inside) for i in steps if i.op == "constant"), 1)
    return -(-max(limits) // step)


def _arrays(type_: str) -> list[tuple[tuple[int, ...], float, bool]]:
    """Shape, bytes, and whether it lies in main memory, of each array of a type."""
    arrays = []
    for element, shape, layout in _ARRAY.findall(type_):
        sizes = tuple(int(size) for size in shape.split(",") if size)
        arrays.append((sizes, math.prod(sizes) * _BYTES.get(element, 1), "S(" not in layout))
    return arrays


def _in_hbm(type_: str) -> float:
    return sum(size for _, size, hbm in _arrays(type_) if hbm)


def _product_flops(i: Instruction, types: dict[str, str]) -> float:
    """FLOPs of a dot, of a library's call for one, or of a convolution (which is what TPUs make of a dot)."""
    result, left, right = (_arrays(t)[0][0] for t in (i.type, *(types[name] for name in i.operands[:2])))
    if i.op != "convolution":
        contracted = re.search(r"lhs_contracting_dim(?:s=\{|ensions\W+)([\d,\"\\]*)", i.rest)[1]
        return 2 * math.prod(result) * math.prod(left[int(d)] for d in re.findall(r"\d+", contracted))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", i.rest) or [0, ""])[1]))
    flops = 2.0 * right[labels[2].index("i")] * right[labels[2].index("o")] * left[labels[1].index("b")]
    groups = re.search(r"batch_group_count=(\d+)", i.rest)
    flops /= int(groups[1]) if groups else 1
    for d in range(len(result) - 2):
        flops *= _overlaps(
            left[labels[1].index(str(d))],
            right[labels[2].index(str(d))],
            result[labels[3].index(str(d))],
            window,
            d,
        )
    return flops


def _splash_product(i: Instruction, types: dict[str, str]) -> float:
    """Operations of one product of scores' size in a splash kernel that skips no block.

    Its first operand has an entry a block of scores and head, as many along one axis as q has blocks; the
    third is q, [H, T, K]. Heads narrower than the matrix unit take as long as if they were as wide.
    """
    ((blocks, _, _),), ((q, _, _),) = (_arrays(types[i.operands[place]]) for place in (0, 2))
    heads, length, width = q
    width = -(-width // MATRIX_UNIT) * MATRIX_UNIT
    return 2 * heads * width * math.prod(blocks) * (length // max(blocks)) ** 2


def _flash_product(i: Instruction, types: dict[str, str]) -> float:
    """The same of a flash kernel, whose first operand is q, [B, L, H, K]."""
    ((rows, length, heads, width), _, _), *_ = _arrays(types[i.operands[0]])
    return 2 * rows * heads * length**2 * width


def _overlaps(left: int, right: int, result: int, window: dict[str, str], d: int) -> int:
    """In how many (result, kernel) places along a spatial dimension the kernel meets an element."""

    def option(name: str, default: str) -> str:
        return window[name].split("x")[d] if name in window else default

    stride, low = int(option("stride", "1")), int(option("pad", "0_0").split("_")[0])
    spread, spacing = int(option("lhs_dilate", "1")), int(option("rhs_dilate", "1"))
    places = [o * stride - low + k * spacing for o in range(result) for k in range(right)]
    return sum(0 <= place <= (left - 1) * spread and place % spread == 0 for place in places)


def _group(rest: str, devices: int) -> int:
    """Devices that take part in a collective together."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(tiled[1])
    return devices


def _sent(i: Instruction, devices: int) -> float:
    """Bytes a device sends in a collective, see `Work`."""
    kind, parts = i.op.removesuffix("-start"), _group(i.rest, devices)
    size = sum(_results(i))
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        size *= parts
    return size * (parts - 1) / parts * (2 if kind == "all-reduce" else 1)


def _results(i: Instruction) -> list[float]:
    """Bytes of each result of a collective.

    The type of one that only starts lists, nested or not, its operands, as many results, and what else it
    keeps; an all-reduce's only the results.
    """
    sizes, operands = [size for _, size, _ in _arrays(i.type)], len(i.operands)
    is_listed = i.op.endswith("-start") and i.op != "all-reduce-start"
    return sizes[operands : 2 * operands] if is_listed else sizes


def _traffic(i: Instruction, types: dict[str, str], computations: dict) -> float:
    """Returns the bytes that an instruction reads from and writes to main memory."""
    if _GEMM.search(i.rest):  # the last of several results is a workspace
        sizes = [size for _, size, hbm in _arrays(i.type) if hbm]
        return sum(_in_hbm(types[name]) for name in i.operands) + sum(sizes[:-1] or sizes)
    if i.op == "custom-call" and not any(target in i.rest for target in _KERNEL_TARGETS):  # hints
        return 0.0
    if i.op.endswith("-start"):  # copies between memories
        return min((size for _, size, _ in _arrays(i.type) if size > 64), default=0)
    if i.op in ("dynamic-slice", "slice", "gather"):
        return 2 * _in_hbm(i.type)
    if i.op == "dynamic-update-slice":
        return 2 * _in_hbm(types[i.operands[1]])
    read = [_in_hbm(types[name]) for name in i.operands]
    if i.op != "fusion":
        return sum(read) + _in_hbm(i.type)
    inside = computations[_CALLED.search(i.rest)[1]]
    written, used = _in_hbm(i.type), dict(enumerate(read))
    shapes = {j.name: j.type for j in inside}
    for j in inside:
        if j.op == "parameter" and (part := _part_used(j.name, inside, shapes)) is not None:
            used[int(j.inside)] = min(used[int(j.inside)], part)
        if j.root and j.op == "dynamic-update-slice":
            written = min(written, sum(size for _, size, _ in _arrays(shapes[j.operands[1]])))
    return sum(used.values()) + written


def _part_used(name: str, inside: list[Instruction], shapes: dict[str, str]) -> float | None:
    """Returns the bytes of a fusion's parameter that its slices read; None if the whole parameter is read."""
    part = 0.0
    for user in inside:
        if name not in user.operands:
            continue
        if user.op == "bitcast":
            below = _part_used(user.name, inside, shapes)
            if below is None:
                return None
            part += below
        elif user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            part += sum(size for _, size, _ in _arrays(user.type))
        elif user.op == "dynamic-update-slice" and user.operands[0] == name:
            continue  # in place
        else:
            return None
    return part
