"""Compilation of a train step for absent devices, and the report on the compiled step."""

from __future__ import annotations

import os

import jax
from ml_collections import ConfigDict

from dualsm.aot.hlo import Work
from dualsm.aot.roofline import estimate
from dualsm.devices import sharding
from dualsm.devices.chips import CHIPS
from dualsm.model import flash, splash
from dualsm.model.flops import train_flops
from dualsm.objectives.example import SpecialIds
from dualsm.process.errors import UserError
from dualsm.process.progress import table
from dualsm.training.program import CompiledTrainStep, activation_bytes, attended_share, batch_shapes

MEMORY_FRACTION = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # new and old name in JAX
TO_SAVE_MEMORY = (
    "set or lower config.per_device_batch_size, set config.model.remat=full, or increase config.mesh.fsdp or "
    "config.mesh.tensor"
)


def compile_step(
    config: ConfigDict, program: CompiledTrainStep, mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
    """Compiles the train step; raises `UserError` if the compiler reports that it does not fit in memory."""
    with jax.set_mesh(mesh):
        lowered = program.step.lower(program.abstract_state, batch_shapes(config, mesh))
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(f"does not fit ({str(error).splitlines()[0]}); {TO_SAVE_MEMORY}") from error


def block_fraction(config: ConfigDict, platform: str) -> float:
    """Returns the fraction of score blocks that the attention kernel computes, for one document per row."""
    sizes = (flash.LENGTHS,) if platform == "gpu" else splash.BLOCKS
    size = next((size for size in sizes if config.seq_len % size == 0), 1)  # 1 if no kernel is used
    return attended_share(config, special_ids(config), size)


def special_ids(config: ConfigDict) -> SpecialIds:
    """Returns the special ids for the config's vocabulary size, without a corpus."""
    return SpecialIds(vocab_size=config.model.vocab_size)


def usable_memory(chip: str) -> int:
    """Returns the bytes of a chip's memory that JAX uses: all on TPUs, by default 75% on GPUs."""
    size = CHIPS[chip].hbm_bytes
    if not CHIPS[chip].gpu or os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() == "platform":
        return size
    fraction = next((os.environ[key] for key in MEMORY_FRACTION if os.environ.get(key)), "0.75")
    try:
        return int(size * float(fraction))
    except ValueError as error:
        raise UserError(
            f"{' or '.join(MEMORY_FRACTION)}={fraction!r} must be a number such as 0.9"
        ) from error


def make_report(
    config: ConfigDict, topology: str, mesh: jax.sharding.Mesh, program: CompiledTrainStep, memory, work: Work
) -> dict:
    """Returns a report on a compiled step; bytes and FLOPs are per device unless the key says otherwise.

    Args:
      config: config of the run.
      topology: for example "v5e:4x4" or "h200:8".
      mesh: mesh over the devices of the topology.
      program: functions of the run.
      memory: XLA's memory analysis of the compiled step.
      work: result of `analyze`.
    """
    special, chip = special_ids(config), topology.split(":")[0]
    share = attended_share(config, special)
    model_flops = config.batch_size * train_flops(config.model, config.seq_len, share)
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    rows = config.batch_size // config.gradient_accumulation_steps // sharding.batch_devices(mesh)
    one_device = jax.sharding.Mesh(mesh.devices.flat[:1].reshape([1] * mesh.devices.ndim), mesh.axis_names)
    with jax.set_mesh(one_device):
        activations = activation_bytes(config, special, rows)
    state = program.abstract_state
    return {
        "topology": topology,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "seq_len": config.seq_len,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "per_device_batch_size": rows,
        "remat": config.model.remat,
        "parameters": sum(p.size for p in jax.tree.leaves(state.params)),
        "memory": {
            "parameters": device_bytes(state.params),
            "optimizer": device_bytes(state.opt_state),
            **({"moving average": device_bytes(state.ema)} if config.ema.decay else {}),
            "activations": activations,
            "temporaries": memory.temp_size_in_bytes - activations,
            "code": memory.generated_code_size_in_bytes,
            "total": total,
            "usable": usable_memory(chip),
            "chip": CHIPS[chip].hbm_bytes,
        },
        "flops": {"model_all_devices": model_flops, "compiled": work.flops},
        "hbm_bytes": work.hbm_bytes,
        "collectives": {
            kind: {"count": work.collective_count[kind], "bytes": sent}
            for kind, sent in sorted(work.collective_bytes.items())
        },
        "roofline": estimate(topology, mesh.size, work, model_flops),
    }


def device_bytes(tree) -> int:
    """Returns the bytes per device of the arrays of a tree."""
    return sum(
        jax.numpy.dtype(x.dtype).itemsize
        * int(jax.numpy.prod(jax.numpy.array(x.sharding.shard_shape(x.shape))))
        for x in jax.tree.leaves(tree)
    )


def as_text(report: dict) -> str:
    """Formats a report as text tables."""
    memory, roofline, flops = report["memory"], report["roofline"], report["flops"]

    def seconds(name: str, kind: str = "") -> str:
        return _figure(roofline[f"{name}_seconds{kind}"])

    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
    chips = f"{report['devices']} chips ({mesh})" if mesh else "one chip"
    collectives = [
        [k, f"{c['count']:,.0f}", _figure(c["bytes"] / 1e9)] for k, c in report["collectives"].items()
    ]
    parts = [
        f"{report['parameters']:,} parameters on {report['topology']}, {chips}; "
        f"batch size {report['batch_size']}, sequence length {report['seq_len']}, "
        f"{report['per_device_batch_size']} sequences per chip and accumulation step, "
        f"remat {report['remat']}",
        table(
            ["memory per chip", "GiB"],
            [[name, gib(memory[name])] for name in memory],
        ),
        table(["collectives per chip and step", "count", "GB sent"], collectives) if collectives else "",
        table(
            ["work per chip and step", "", "seconds at peak"],
            [
                [
                    "matrix products",
                    f"{_figure(flops['compiled'] / 1e12)} TFLOP",
                    seconds("compute"),
                ],
                ["main memory", f"{_figure(report['hbm_bytes'] / 1e9)} GB", seconds("memory")],
                [
                    "interconnect",
                    f"{_figure(sum(c['bytes'] for c in report['collectives'].values()) / 1e9)} GB",
                    seconds("interconnect"),
                ],
            ],
        ),
        f"step: {seconds('step', '_overlapped')} s with full overlap, "
        f"{seconds('step', '_serial')} s without overlap; "
        f"MFU {roofline['mfu_overlapped']:.0%} and {roofline['mfu_serial']:.0%}",
        f"assumed: {roofline['assumptions']}",
    ]
    return "\n\n".join(filter(None, parts))


def _figure(number: float) -> str:
    """Formats a number with three significant digits, or all of them before the decimal point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
