"""Descriptions of absent devices, for ahead-of-time compilation."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence

import jax

from dualsm.devices.chips import CHIPS
from dualsm.process.errors import UserError


def absent_devices(topology: str) -> Sequence[jax.Device]:
    """Returns the devices of a TPU slice such as "v5e:4x4", or of one host with GPUs such as "h200:8".

    Raises:
      UserError: if the compiler for the devices is not installed or does not support the topology.
    """
    tpus, gpus = ("|".join(name for name in CHIPS if bool(CHIPS[name].gpu) == kind) for kind in (False, True))
    if not re.fullmatch(rf"({tpus}):\d+(x\d+)*|({gpus}):[1-9]\d*", topology):
        raise UserError(
            f"--topology={topology} must have the form CHIP:AxB or CHIP:AxBxC for TPUs, or CHIP:N for GPUs; "
            f"chips: {', '.join(CHIPS)}"
        )
    jax.config.update("jax_platforms", "cpu")  # do not search for accelerators
    chip, size = topology.split(":")
    try:
        return _gpus(chip, size) if CHIPS[chip].gpu else _tpus(topology)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology}: {str(error).splitlines()[0]}") from error


def _tpus(topology: str) -> Sequence[jax.Device]:
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, the compiler for TPUs, is not installed; run pip install 'dualsm[tpu]'")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there may be no cloud metadata server
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chips are used, so processes do not conflict
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{topology.split(':')[0]}-8")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    both_cores = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}  # one device per chip
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **both_cores).devices


def _gpus(chip: str, number: str) -> Sequence[jax.Device]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name=chip, topology=f"1x1x{number}", target_config=_target(chip)
        ).devices
    except NotImplementedError as error:  # raised by JAX if no plugin compiles for the platform
        raise UserError("JAX's CUDA plugin is not installed; run pip install 'dualsm[cuda]'") from error


def _target(chip: str) -> str:
    """Returns XLA's description of a GPU, a `GpuTargetConfigProto` in text format."""
    properties = CHIPS[chip]
    gpu = properties.gpu
    return f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.name}"
        gpu_device_info {{
          cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
          core_count: {gpu.processors}
          clock_rate_ghz: {gpu.clock}
          l2_cache_size: {gpu.cache}
          device_memory_size: {properties.hbm_bytes}
          memory_bandwidth: {int(properties.hbm_bandwidth)}
          shared_memory_per_core: {gpu.shared}
          shared_memory_per_block_optin: {gpu.shared - 1024}
          shared_memory_per_block: 49152
          fpus_per_core: {64 if gpu.capability[0] == 8 else 128}
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}
        runtime_version {{ major: 13 }}
        dnn_version_info {{ major: 9 minor: 8 }}
    """
