"""Measures compile time against depth, and the memory of a step against one that materializes all logits.

    JAX_PLATFORMS=cpu python benchmarks/compiling.py
    python benchmarks/compiling.py --topology=v5e:2x2    # memory on a TPU, without a TPU

Compile times include tracing of the whole train step, alternate between models and use no cache. The
layers are in one scan, so depth should not affect them. Memory is XLA's analysis of the compiled step
(`memory_analysis`); nothing is executed. The baseline is the same step with the textbook loss: a softmax over
all logits, differentiated by `jax.grad`.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from dualsm.aot.absent import absent_devices
from dualsm.config import default_config
from dualsm.devices import sharding
from dualsm.model.cross_entropy import cross_entropy
from dualsm.objectives.example import SpecialIds
from dualsm.process import cli
from dualsm.process.progress import say, table
from dualsm.training import objective_loss
from dualsm.training.program import batch_shapes, compile_train_step

_ROUNDS = flags.DEFINE_integer("rounds", 5, "number of compilations; results are medians")
_ROWS = flags.DEFINE_integer("rows", 8, "batch size for memory measurements", lower_bound=1)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "",
    "TPU slice to compile for when measuring memory; default: this machine",
)
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")

SHALLOW, DEEP = 4, 24  # layers
SEQ_LEN, VOCAB_SIZE = 2048, 51_200
MODELS = {
    # num_layers, d_model, num_heads, d_ff, remat
    "step, default config": (4, 256, 4, 704, "matmuls"),
    "step, dual_470m": (24, 1024, 16, 3554, "full"),
}


def step_config(layers: int, width: int, heads: int, d_ff: int, remat: str = "matmuls") -> ConfigDict:
    """Returns the default config with the given sizes and a mixture of three objectives."""
    config = default_config()
    model = config.model
    model.num_layers, model.d_model, model.num_heads, model.d_ff = layers, width, heads, d_ff
    model.remat = remat
    config.mixture.causal, config.mixture.prefix, config.mixture.masked_diffusion = 0.5, 0.25, 0.25
    return config


def compiled_step(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> jax.stages.Compiled:
    """Compiles the train step for the first of `devices`, by default of this machine."""
    mesh = sharding.make_mesh(config.mesh, (devices or jax.devices())[:1])
    with jax.set_mesh(mesh):
        program = compile_train_step(config, SpecialIds(vocab_size=config.model.vocab_size), mesh)
        return program.step.lower(program.abstract_state, batch_shapes(config, mesh)).compile()


def compile_seconds(layers: int) -> float:
    """Returns the seconds to trace and compile the step of a small model with `layers` layers."""
    config = step_config(layers, 64, 2, 192)
    config.seq_len, config.batch_size, config.model.vocab_size = 128, 8, 512
    jax.clear_caches()
    start = time.perf_counter()
    compiled_step(config)
    return time.perf_counter() - start


def textbook_loss(features_BxLxD, kernel_DxV, bias_V, targets_BxL, weights_BxL, z_weights_BxL, chunk):
    """Computes `cross_entropy` of dualsm/model/cross_entropy.py without chunking; `chunk` is ignored."""
    kernel_DxV = kernel_DxV.astype(features_BxLxD.dtype)
    logits_BxLxV = jnp.einsum("bld,dv->blv", features_BxLxD, kernel_DxV, preferred_element_type=jnp.float32)
    logits_BxLxV += bias_V
    normalizer_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)
    at_target_BxL = jnp.take_along_axis(logits_BxLxV, targets_BxL[..., None], axis=-1)[..., 0]
    nll_BxL = normalizer_BxL - at_target_BxL
    return jnp.sum(weights_BxL * nll_BxL + z_weights_BxL * normalizer_BxL**2), nll_BxL


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the peak temporary memory of a program in bytes, without its inputs and outputs."""
    return compiled.memory_analysis().temp_size_in_bytes


def step_memory(sizes: tuple, devices: Sequence[jax.Device] | None) -> tuple[int, int]:
    """Returns the temporary bytes of the step, with the chunked loss and with the textbook loss."""
    config = step_config(*sizes)
    config.seq_len, config.batch_size, config.model.vocab_size = SEQ_LEN, _ROWS.value, VOCAB_SIZE
    ours = temporary_bytes(compiled_step(config, devices))
    with mock.patch.object(objective_loss, "cross_entropy", textbook_loss):
        return ours, temporary_bytes(compiled_step(config, devices))


def loss_memory() -> tuple[int, int]:
    """Returns the temporary bytes of both losses with gradients, for the default sizes."""
    config = default_config()
    width, chunk = config.model.d_model, config.loss.chunk_size
    rows_BxL = (_ROWS.value, SEQ_LEN)
    shapes = [(*rows_BxL, width), (width, VOCAB_SIZE), (VOCAB_SIZE,), rows_BxL, rows_BxL, rows_BxL]
    types = [jnp.float32, jnp.float32, jnp.float32, jnp.int32, jnp.float32, jnp.float32]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, types, strict=True)]

    def size(loss) -> int:
        gradients = jax.grad(lambda *arrays: loss(*arrays, chunk)[0], argnums=(0, 1, 2))
        return temporary_bytes(jax.jit(gradients).lower(*arrays).compile())

    return size(cross_entropy), size(textbook_loss)


def compile_times() -> dict:
    """Returns the median compile times of a shallow and a deep model, and the median of their ratio."""
    compile_seconds(SHALLOW)
    pairs = [(compile_seconds(SHALLOW), compile_seconds(DEEP)) for _ in range(_ROUNDS.value)]
    return {
        "shallow_seconds": statistics.median(shallow for shallow, _ in pairs),
        "deep_seconds": statistics.median(deep for _, deep in pairs),
        "ratio": statistics.median(deep / shallow for shallow, deep in pairs),
    }


def main(_: Sequence[str]) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    devices = absent_devices(_TOPOLOGY.value) if _TOPOLOGY.value else None
    compiling = compile_times()
    say(
        f"compile: {SHALLOW} layers {compiling['shallow_seconds']:.2f} s, {DEEP} layers "
        f"{compiling['deep_seconds']:.2f} s, ratio {compiling['ratio']:.2f}; load {os.getloadavg()[0]:.1f}"
    )
    bytes_ = {"loss only, d_model 256": loss_memory()}
    bytes_ |= {name: step_memory(sizes, devices) for name, sizes in MODELS.items()}
    memories = {
        name: {"temporary_gib": ours / 2**30, "whole_logits_gib": whole / 2**30, "ratio": ours / whole}
        for name, (ours, whole) in bytes_.items()
    }
    rows = [
        [name, f"{r['temporary_gib']:.2f}", f"{r['whole_logits_gib']:.2f}", f"{r['ratio']:.2f}"]
        for name, r in memories.items()
    ]
    say(f"temporary memory in GiB, {_ROWS.value} sequences of {SEQ_LEN:,} tokens, {VOCAB_SIZE:,} ids:")
    say(table(["", "dualsm", "all logits", "ratio"], rows))
    if _OUTPUT.value:
        content = {"compile": compiling, "rows": _ROWS.value, "memory": memories}
        Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
