"""The device mesh and the sharding of every array.

Arrays have logical axes (batch, embed, heads, ...). `RULES` maps logical axes to mesh axes, and `PARAMETERS`
lists the logical axes of each parameter. Optimizer state is sharded like its parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import jax
import ml_collections
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dualsm.process.errors import UserError

AXES = ("replica", "data", "fsdp", "tensor")

RULES = {
    "batch": ("replica", "data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocabulary": "tensor",
    "layers": "fsdp",  # only for intermediates of Muon; parameters are not sharded over layers
    None: None,
}

_COPIES = ("replica", "data")  # axes that replicate the parameters

# Tokens per CPU core and accumulation step; the activations of a small model's layer then fit in its cache.
CORE_TOKENS = 512

PARAMETERS = {
    r"embedding/embedding": ("vocabulary", "embed"),
    r"blocks/attention/(query|key|value)/kernel": (None, "embed", "heads"),
    r"blocks/attention/(query|key|value)/bias": (None, "heads"),
    r"blocks/attention/(query|key)_norm/scale": (None, None),
    r"blocks/attention/output/kernel": (None, "heads", "embed"),
    r"blocks/mlp/(value|gate)/kernel": (None, "embed", "mlp"),
    r"blocks/mlp/down/kernel": (None, "mlp", "embed"),
    r"blocks/(attention|mlp)/norm/scale": (None, None),
    r"head/norm/scale": (None,),
    r"head/projection/kernel": ("embed", None),
    r"head/output/kernel": ("embed", "vocabulary"),
    r"head/output/bias": ("vocabulary",),
}


def make_mesh(config: ml_collections.ConfigDict, devices: Sequence[jax.Device]) -> Mesh:
    """Creates a mesh over all `devices` with the axes `AXES`.

    Args:
      config: `config.mesh`, the size of each axis; -1 for at most one axis, which gets the remaining devices.
      devices: devices of the mesh.

    Raises:
      UserError: if the product of the sizes is not the number of devices, or `replica` is not a multiple of
        the number of TPU slices.
    """
    sizes = [config[axis] for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or fixed <= 0 or (-1 in sizes and len(devices) % fixed):
        raise UserError(f"{_format_sizes(sizes)} does not fill {len(devices)} devices; change the sizes")
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"{_format_sizes(sizes)} needs {math.prod(sizes)} devices, there are {len(devices)}; change one"
        )
    if devices[0].platform != "tpu":
        # JAX reports the GPUs of a host as a slice; sorted, the last axes stay within a host.
        return Mesh(np.array(sorted(devices, key=_slice)).reshape(sizes), AXES)
    slices = len({_slice(device) for device in devices})
    if slices == 1:
        return jax.make_mesh(sizes, AXES, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    if sizes[0] % slices:
        raise UserError(
            f"{_format_sizes(sizes)}: there are {slices} slices, and replica must be {slices} or a multiple"
        )
    sizes_in_slice = [sizes[0] // slices, *sizes[1:]]
    device_array = mesh_utils.create_hybrid_device_mesh(
        sizes_in_slice, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(device_array, AXES)


def _slice(device: jax.Device) -> int:
    """Returns the index of the device's slice; 0 for devices without one, such as CPUs."""
    return getattr(device, "slice_index", 0)


def _format_sizes(sizes: Sequence[int]) -> str:
    return "config.mesh " + " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))


def batch_devices(mesh: Mesh) -> int:
    """Returns the number of devices that share a batch."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def accumulation_steps(config: ml_collections.ConfigDict, mesh: Mesh) -> int:
    """Returns the number of gradient accumulation steps per train step.

    With `config.per_device_batch_size` it is the smallest number that keeps each device at or below that many
    sequences, so that fewer devices take more steps and the batch stays the same. Otherwise it is
    `config.gradient_accumulation_steps`; if that is 1 and the devices are CPU devices that all have the whole
    parameters, it is the smallest number that keeps each at or below `CORE_TOKENS`.

    Raises:
      UserError: if the devices cannot share the batch evenly.
    """
    parts = batch_devices(mesh)
    rows, rest = divmod(config.batch_size, parts)
    if rest:
        raise UserError(
            f"config.batch_size={config.batch_size} must be a multiple of the {parts} devices that share it; "
            "change it or config.mesh"
        )
    if not config.per_device_batch_size and rows % config.gradient_accumulation_steps:
        raise UserError(
            f"{parts} devices cannot share config.batch_size={config.batch_size} evenly with "
            f"config.gradient_accumulation_steps={config.gradient_accumulation_steps}; change one of them"
        )
    limit = config.per_device_batch_size
    if (
        not limit
        and config.gradient_accumulation_steps == 1
        and mesh.devices.flat[0].platform == "cpu"
        and _has_copies(mesh)
    ):
        limit = max(1, CORE_TOKENS // config.seq_len)
    if not limit:
        return config.gradient_accumulation_steps
    return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= limit)


def spec(*logical: str | None) -> PartitionSpec:
    """Returns the partition spec of an array with the given logical axes."""
    return PartitionSpec(*(RULES[axis] for axis in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrains the sharding of an intermediate; does nothing without a mesh or inside `shard_map`."""
    if not _divides(jax.sharding.get_abstract_mesh()):
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical))


def platform() -> str:
    """Returns the platform that the current trace is compiled for: of `jax.set_mesh`, or JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def divided_by(logical: str) -> int:
    """Returns the number of shards of a logical axis; 1 without a mesh or inside `shard_map`."""
    mesh, axes = jax.sharding.get_abstract_mesh(), RULES[logical]
    if not _divides(mesh):
        return 1
    return math.prod(mesh.shape.get(axis, 1) for axis in ([axes] if isinstance(axes, str) else axes))


def shard_mapped(
    function: Callable, inputs: Sequence[Sequence[str | None]], output: Sequence[str | None]
) -> Callable:
    """Wraps a function that GSPMD cannot partition, such as a kernel, in `shard_map`.

    Args:
      function: function of arrays.
      inputs: logical axes of each argument.
      output: logical axes of the result.
    """
    if not _divides(jax.sharding.get_abstract_mesh()):
        return function
    specs = tuple(spec(*logical) for logical in inputs)
    return jax.shard_map(function, in_specs=specs, out_specs=spec(*output), check_vma=False)


def summed_over_devices(function: Callable) -> Callable:
    """Wraps `function(params, rows) -> (sums, by_row)` in `shard_map`, with one all-reduce of `sums`.

    GSPMD would insert an all-reduce in each layer of each accumulation step. If parameters are sharded too,
    returns the function unchanged.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not (_divides(mesh) and _has_copies(mesh)):
        return function

    def on_one_device(params, rows):
        sums, by_row = function(params, rows)
        return jax.lax.psum(sums, _COPIES), by_row

    specs = (PartitionSpec(), spec("batch"))
    return jax.shard_map(on_one_device, in_specs=specs, out_specs=specs, check_vma=False)


def _has_copies(mesh: Mesh | jax.sharding.AbstractMesh) -> bool:
    """Returns True if there are several devices and the parameters are replicated."""
    return mesh.size > 1 and mesh.size == math.prod(mesh.shape[axis] for axis in _COPIES)


def _divides(mesh: jax.sharding.AbstractMesh) -> bool:
    """Returns True inside a mesh but outside `shard_map`."""
    return not mesh.empty and not mesh.manual_axes


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the sorted indices of the rows of a batch on this process's devices."""
    parts = NamedSharding(mesh, spec("batch")).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in parts.values()]))


def shard_batch(mesh: Mesh, rows_Px: np.ndarray, batch_size: int | None = None) -> jax.Array:
    """Shards a batch over the devices of all processes; each process provides its own rows.

    Args:
      mesh: mesh of the devices.
      rows_Px: the global batch, or, with `batch_size`, the rows given by `process_rows`.
      batch_size: B, number of rows of the global batch.
    """
    row_P = np.arange(len(rows_Px)) if batch_size is None else process_rows(mesh, batch_size)
    batch_size = batch_size or len(rows_Px)

    def part(index) -> np.ndarray:
        start, stop, _ = index[0].indices(batch_size)
        return rows_Px[slice(*np.searchsorted(row_P, (start, stop)))]

    shape = (batch_size, *rows_Px.shape[1:])
    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec("batch")), part)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that are replicated on all devices."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(mesh: Mesh, tree):
    """Returns the shardings of a tree that contains parameters, such as a train state.

    A leaf below a parameter's path, such as an optimizer's momentum, is sharded like that parameter. Scalars
    and vectors outside of parameters (counters, metrics) are replicated.

    Args:
      mesh: the mesh.
      tree: arrays or their shapes.

    Raises:
      UserError: for a parameter or an array of two or more dimensions without a rule, or if a mesh axis does
        not divide the dimension that it splits.
    """

    def one(path, leaf) -> NamedSharding:
        name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        for pattern, logical in PARAMETERS.items():
            if re.search(f"(^|/){pattern}$", name) and len(logical) == len(leaf.shape):
                _check_divides(mesh, name, leaf.shape, logical)
                return NamedSharding(mesh, spec(*logical))
        if len(leaf.shape) > 1 or name.startswith("params/"):
            raise UserError(
                f"no sharding rule matches {name} of shape {tuple(leaf.shape)}; add one to PARAMETERS in "
                "dualsm/devices/sharding.py"
            )
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


def _check_divides(mesh: Mesh, name: str, shape: Sequence[int], logical: Sequence[str | None]) -> None:
    for size, axis in zip(shape, logical, strict=True):
        parts = mesh.shape[RULES[axis]] if axis else 1
        if size % parts:
            raise UserError(
                f"config.mesh.{RULES[axis]}={parts} does not divide the {axis} dimension ({size}) of {name}; "
                f"choose a divisor of {size}"
            )
