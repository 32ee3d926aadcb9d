"""Number of CPU devices for a run: several for small models, which then share the sequences of a batch.

On one device XLA splits each operation over the cores, which is inefficient for the operations of a small
model. For the measurements see docs/performance.md.
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
from dualsm.objectives.sources import trained_sources

# Matrix parameters; above this, replicating the parameters costs more than data parallelism saves.
MAX_PARAMETERS = 2_000_000


def cpu_devices(config: ml_collections.ConfigDict) -> int:
    """Returns the number of CPU devices for a run in a single process.

    Small models get up to one device per core, as long as each device has at least `CORE_TOKENS` tokens per
    step. Larger models, and meshes that are not purely data parallel, get one device.

    Returns:
      The number of devices; 0 if `JAX_NUM_CPU_DEVICES` or `XLA_FLAGS` sets it already.

    Raises:
      UserError: if the config is invalid, or the corpus of a small model cannot be read.
    """
    check_config(config)
    flag = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if flag or jax.config.jax_num_cpu_devices > 0:
        return 0
    mesh = config.mesh
    if mesh.data != -1 or mesh.replica * mesh.fsdp * mesh.tensor != 1:
        return 1
    model = config.model.copy_and_resolve_references()
    if not model.vocab_size and matrix_parameters(model) <= MAX_PARAMETERS:  # opening a corpus can be slow
        source = trained_sources(config)[0]
        model.vocab_size = Corpus(source.corpus, source.corpus_key).vocab_size
    if matrix_parameters(model) > MAX_PARAMETERS:
        return 1
    limit = min(_whole_cores(), config.batch_size * config.seq_len // CORE_TOKENS)
    return max((n for n in range(1, limit + 1) if config.batch_size % n == 0), default=1)


def _whole_cores() -> int:
    return max(int(usable_cores()), 1)
