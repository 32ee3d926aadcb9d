"""FLOPs, memory traffic and collectives per device of a compiled program, computed from its HLO text.

XLA's own cost analysis counts the body of a loop once; this module multiplies by the number of iterations. In
a train step the loops (gradient accumulation, layers, chunks of logits) run from 0 to a constant.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import NamedTuple

from dualsm.aot.hlo_parser import Instruction, bytes_in_hbm, parse_arrays, parse_module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

MATRIX_UNIT = 128  # rows and columns of the matrix unit of TPUs up to v5

# Splash kernels are identified by the name of the instruction, flash kernels by its attributes. The table
# contains the number of [L, L] matrix products in each kernel.
_SPLASH = re.compile(r"splash_mha_(fwd|dq|dkv)")
_FLASH = re.compile(r'name = "flash_(forward|backward_queries|backward_keys)"')
_KERNEL_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "forward": 2, "backward_queries": 3, "backward_keys": 4}
_KERNEL_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton")
# Calls of cuBLAS, such as "__cublas$gemm" and "__cublas$lt$matmul$f8".
_GEMM = re.compile(r'custom_call_target="__cublas\$(gemm|lt\$matmul)')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_MOVES_NOTHING = (
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "call", "conditional",
    "after-all", "iota", "partition-id", "replica-id", "opt-barrier",
)  # fmt: skip


class Work(NamedTuple):
    """Work of one device in one execution of a program.

    Attributes:
      flops: FLOPs of matrix products, two per multiply-add. In attention kernels, heads narrower than the
        matrix unit count as padded.
      hbm_bytes: estimated main memory traffic, assuming that each fusion and kernel reads its operands and
        writes its results once.
      collective_bytes: kind -> bytes that the device sends on a ring of n devices: (n - 1) / n of the array
        for all-gather, reduce-scatter and all-to-all, twice that for all-reduce, the whole array for
        collective-permute.
      collective_count: kind -> number of executions.
    """

    flops: float
    hbm_bytes: float
    collective_bytes: dict[str, float]
    collective_count: dict[str, float]


def analyze(text: str, devices: int, block_fraction: float = 1.0) -> Work:
    """Computes the work of a compiled program.

    Args:
      text: text of the optimized module, from `compiled.as_text()`.
      devices: number of devices in the mesh; group size of collectives that do not specify one.
      block_fraction: fraction of the score blocks that the attention kernels compute; the kernels decide at
        run time which blocks they skip.
    """
    computations, entry = parse_module(text)
    counts, fused = _execution_counts(computations, entry)
    flops = hbm_bytes = 0.0
    collectives = {}
    for name, instructions in computations.items():
        if not counts[name]:
            continue
        types = {i.name: i.type for i in instructions}
        for i in instructions:
            product = 0.0
            if i.op in ("convolution", "dot") or _GEMM.search(i.attributes):
                product = _product_flops(i, types)
            elif kernel := _SPLASH.match(i.name):
                product = block_fraction * _KERNEL_PRODUCTS[kernel[1]] * _splash_product(i, types)
            elif i.op == "custom-call" and (kernel := _FLASH.search(i.attributes)):
                product = block_fraction * _KERNEL_PRODUCTS[kernel[1]] * _flash_product(i, types)
            flops += counts[name] * product
            kind = i.op.removesuffix("-start")
            if kind in COLLECTIVES:
                # An overlapped collective appears in every fusion of its chain.
                chain = re.search(r'chain_id="(\d+)"', i.attributes)
                collectives[kind, chain[1] if chain else i.name] = counts[name], _sent(i, devices)
            elif name not in fused and i.op not in _MOVES_NOTHING and not i.op.endswith("-done"):
                hbm_bytes += counts[name] * _traffic(i, types, computations)
    collective_bytes, collective_count = defaultdict(float), defaultdict(float)
    for (kind, _), (count, size) in collectives.items():
        collective_bytes[kind] += count * size
        collective_count[kind] += count
    return Work(flops, hbm_bytes, dict(collective_bytes), dict(collective_count))


def _execution_counts(computations: dict, entry: str) -> tuple[dict[str, float], set[str]]:
    """Returns the number of executions of each computation, and the names of the fused computations."""
    counts, fused = defaultdict(float), set()

    def visit(name: str, count: float) -> None:
        counts[name] += count
        for i in computations.get(name, ()):
            called = _CALLED.findall(i.attributes)
            if i.op == "fusion":
                fused.update(called)
            if i.op == "while":
                condition, body = (
                    re.search(rf"{k}=%?([\w.\-]+)", i.attributes)[1] for k in ("condition", "body")
                )
                called_count = count * _trip_count(computations[condition], computations[body], i.attributes)
                called = [body]
            elif i.op == "conditional":
                called_count = count
                branches = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
                called = re.findall(r"[\w.\-]+", branches[1]) if branches else _BRANCHES.findall(i.attributes)
            elif i.op in ("fusion", "call") or i.op.startswith("async"):
                called_count = count
            else:
                continue  # computations of reductions, comparisons and sorts, whose work is negligible
            for inner in called:
                visit(inner, called_count)

    visit(entry, 1.0)
    return counts, fused


def _trip_count(condition: list[Instruction], body: list[Instruction], attributes: str) -> int:
    """Returns the number of iterations of a loop.

    Uses the `known_trip_count` attribute, or else divides the limit of the loop counter by its increment.
    """
    if known := re.search(r"known_trip_count[^\d]*(\d+)", attributes):
        return int(known[1])
    limits = [
        int(i.arguments) for i in condition if i.op == "constant" and i.type.startswith(("s32[]", "u32[]"))
    ]
    counters = [i for i in condition if i.op == "get-tuple-element" and i.type.startswith(("s32[]", "u32[]"))]
    if not limits or not counters:
        return 1
    index = int(re.search(r"index=(\d+)", counters[0].attributes)[1])
    by_name = {i.name: i for i in body}
    result = next(i for i in body if i.root)
    last = by_name.get(result.operands[index]) if result.op == "tuple" else None
    addends = (
        [by_name[name] for name in last.operands if name in by_name] if last and last.op == "add" else []
    )
    increment = next((int(i.arguments) for i in addends if i.op == "constant"), 1)
    return -(-max(limits) // increment)


def _product_flops(i: Instruction, types: dict[str, str]) -> float:
    """Returns the FLOPs of a dot, a cuBLAS call or a convolution (the TPU compiler's form of a dot)."""
    result, left, right = (parse_arrays(t)[0][0] for t in (i.type, *(types[name] for name in i.operands[:2])))
    if i.op != "convolution":
        contracted = re.search(r"lhs_contracting_dim(?:s=\{|ensions\W+)([\d,\"\\]*)", i.attributes)[1]
        return 2 * math.prod(result) * math.prod(left[int(d)] for d in re.findall(r"\d+", contracted))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    window = dict(
        re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", i.attributes) or [0, ""])[1])
    )
    flops = 2.0 * right[labels[2].index("i")] * right[labels[2].index("o")] * left[labels[1].index("b")]
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    flops /= int(groups[1]) if groups else 1
    for d in range(len(result) - 2):
        flops *= _window_hits(
            left[labels[1].index(str(d))],
            right[labels[2].index(str(d))],
            result[labels[3].index(str(d))],
            window,
            d,
        )
    return flops


def _splash_product(i: Instruction, types: dict[str, str]) -> float:
    """Returns the FLOPs of one [L, L] matrix product in a splash kernel that computes all blocks.

    The kernel's first operand has one entry per head and block of scores, and its longer axis has one entry
    per block of queries. The third operand is q, [H, L, K]. Heads are padded to the width of the matrix unit.
    """
    ((blocks, _, _),), ((q, _, _),) = (parse_arrays(types[i.operands[operand]]) for operand in (0, 2))
    heads, length, head_dim = q
    head_dim = -(-head_dim // MATRIX_UNIT) * MATRIX_UNIT
    return 2 * heads * head_dim * math.prod(blocks) * (length // max(blocks)) ** 2


def _flash_product(i: Instruction, types: dict[str, str]) -> float:
    """Returns the FLOPs of one [L, L] matrix product in a flash kernel; the first operand is [B, L, H, K]."""
    ((rows, length, heads, head_dim), _, _), *_ = parse_arrays(types[i.operands[0]])
    return 2 * rows * heads * length**2 * head_dim


def _window_hits(left: int, right: int, result: int, window: dict[str, str], d: int) -> int:
    """Counts the (result, kernel) index pairs of a convolution that read an input element, not padding.

    Args:
      left: size of the input along a spatial dimension.
      right: size of the kernel.
      result: size of the result.
      window: attributes of the window.
      d: index of the spatial dimension.
    """

    def option(name: str, default: str) -> str:
        return window[name].split("x")[d] if name in window else default

    stride, low = int(option("stride", "1")), int(option("pad", "0_0").split("_")[0])
    lhs_dilate, rhs_dilate = int(option("lhs_dilate", "1")), int(option("rhs_dilate", "1"))
    indices = [o * stride - low + k * rhs_dilate for o in range(result) for k in range(right)]
    return sum(0 <= index <= (left - 1) * lhs_dilate and index % lhs_dilate == 0 for index in indices)


def _group_size(attributes: str, devices: int) -> int:
    """Returns the number of devices in a group of a collective."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(tiled[1])
    return devices


def _sent(i: Instruction, devices: int) -> float:
    """Returns the bytes that a device sends in a collective; see `Work`."""
    kind, parts = i.op.removesuffix("-start"), _group_size(i.attributes, devices)
    size = sum(_result_bytes(i))
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        size *= parts
    return size * (parts - 1) / parts * (2 if kind == "all-reduce" else 1)


def _result_bytes(i: Instruction) -> list[float]:
    """Returns the bytes of each result of a collective.

    The type of a "-start" instruction contains the operands, then the results, then other buffers; the type
    of an all-reduce-start contains only the results.
    """
    sizes, operands = [size for _, size, _ in parse_arrays(i.type)], len(i.operands)
    has_operands = i.op.endswith("-start") and i.op != "all-reduce-start"
    return sizes[operands : 2 * operands] if has_operands else sizes


def _traffic(i: Instruction, types: dict[str, str], computations: dict) -> float:
    """Returns the bytes that an instruction reads from and writes to main memory."""
    if _GEMM.search(i.attributes):  # the last result is a workspace
        sizes = [size for _, size, hbm in parse_arrays(i.type) if hbm]
        return sum(bytes_in_hbm(types[name]) for name in i.operands) + sum(sizes[:-1] or sizes)
    if i.op == "custom-call" and not any(
        target in i.attributes for target in _KERNEL_TARGETS
    ):  # compiler hints
        return 0.0
    if i.op.endswith("-start"):  # a copy between memory spaces
        return min((size for _, size, _ in parse_arrays(i.type) if size > 64), default=0)
    if i.op in ("dynamic-slice", "slice", "gather"):
        return 2 * bytes_in_hbm(i.type)
    if i.op == "dynamic-update-slice":
        return 2 * bytes_in_hbm(types[i.operands[1]])
    read = [bytes_in_hbm(types[name]) for name in i.operands]
    if i.op != "fusion":
        return sum(read) + bytes_in_hbm(i.type)
    inside = computations[_CALLED.search(i.attributes)[1]]
    written, used = bytes_in_hbm(i.type), dict(enumerate(read))
    shapes = {j.name: j.type for j in inside}
    for j in inside:
        if j.op == "parameter" and (part := _part_used(j.name, inside, shapes)) is not None:
            used[int(j.arguments)] = min(used[int(j.arguments)], part)
        if j.root and j.op == "dynamic-update-slice":
            written = min(written, sum(size for _, size, _ in parse_arrays(shapes[j.operands[1]])))
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
            part += sum(size for _, size, _ in parse_arrays(user.type))
        elif user.op == "dynamic-update-slice" and user.operands[0] == name:
            continue  # in place
        else:
            return None
    return part
