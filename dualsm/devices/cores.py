"""Small models on a CPU: JAX takes the cores for devices, which share the rows of a batch.

On one device each operation is divided between the cores, and those of a small model are too small for that.
The numbers here are measured, see docs/performance.md.
"""

from __future__ import annotations

import os

import jax
import ml_collections

from dualsm.config import check_config
from dualsm.data.corpus import Corpus
from dualsm.devices.chips import usable_cores
from dualsm.devices.sharding import CORE_TOKENS
from dualsm.model.flops import matrix_parameters

SMALL = 2_000_000  # weights of matrices; with more, keeping copies of them costs what is won


def devices(config: ml_collections.ConfigDict) -> int:
    """CPU devices for a run of this process alone: one a core for small models, as far as rows suffice.

    What JAX was told already stays, by `JAX_NUM_CPU_DEVICES` or by XLA's own flag. Where the mesh is to be
    filled in another way than by copies of the model, it is one device.

    Returns:
      Their number; 0: leave it as it is.

    Raises:
      UserError: for impossible configs, and for small models when the corpus cannot be read.
    """
    check_config(config)
    flag = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if flag or jax.config.jax_num_cpu_devices > 0:
        return 0
    mesh = config.mesh
    if mesh.data != -1 or mesh.replica * mesh.fsdp * mesh.tensor != 1:
        return 1
    model = config.model.copy_and_resolve_references()
    if not model.vocab_size and matrix_parameters(model) <= SMALL:  # a corpus in a bucket takes time to open
        model.vocab_size = Corpus(config.data.path).vocab_size
    if matrix_parameters(model) > SMALL:
        return 1
    most = min(_cores(), config.batch_size * config.seq_len // CORE_TOKENS)
    return max((n for n in range(1, most + 1) if config.batch_size % n == 0), default=1)


def _cores() -> int:
    """Whole cores that this process may use."""
    return max(int(usable_cores()), 1)
