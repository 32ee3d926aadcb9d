"""The device mesh, and the one table that says how every array lies on it.

Arrays have logical axes (batch, embed, heads, ...); `RULES` maps those to mesh axes, `PARAMETERS` names
the logical axes of each parameter. The optimizer's state lies as the parameters it belongs to.
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
    "layers": "fsdp",  # of what Muon works on; parameters are not split along it
    None: None,
}

_COPIES = ("replica", "data")  # axes whose devices all hold the whole parameters

# Tokens that a CPU's core works through at once: what a small model's layer makes of them stays in its cache.
CORE_TOKENS = 512

PARAMETERS = {
    r"embedding/embedding": ("vocabulary", "embed"),
    r"blocks/attention/(query|key|value)/kernel": (None, "embed", "heads"),
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
    """A mesh over `devices` with the axes `AXES`.

    Args:
      config: `config.mesh`, the size of each axis; one of them may be -1, which fills.
      devices: to be used all.

    Raises:
      UserError: when the sizes do not multiply to the number of devices, or `replica` does not lie across the
        slices of TPUs.
    """
    sizes = [config[axis] for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or fixed <= 0 or (-1 in sizes and len(devices) % fixed):
        raise UserError(f"{_spell(sizes)} does not fill {len(devices)} devices")
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise UserError(f"{_spell(sizes)} needs {math.prod(sizes)} devices, there are {len(devices)}")
    if devices[0].platform != "tpu":
        # JAX counts the GPUs of a machine as a slice: the last axes lie within one.
        return Mesh(np.array(sorted(devices, key=_slice)).reshape(sizes), AXES)
    slices = len({_slice(device) for device in devices})
    if slices == 1:
        return jax.make_mesh(sizes, AXES, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    if sizes[0] % slices:
        raise UserError(
            f"{_spell(sizes)}: the TPUs are {slices} slices, and replica must be {slices} or a multiple of it"
        )
    inside = [sizes[0] // slices, *sizes[1:]]
    laid = mesh_utils.create_hybrid_device_mesh(
        inside, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(laid, AXES)


def _slice(device: jax.Device) -> int:
    """Which of the groups with fast links between their devices it is in; CPUs do not say."""
    return getattr(device, "slice_index", 0)


def _spell(sizes: Sequence[int]) -> str:
    return "config.mesh " + " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))


def batch_devices(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def accumulation_steps(config: ml_collections.ConfigDict, mesh: Mesh) -> int:
    """Returns the number of gradient accumulation steps of a training step.

    With `config.per_device_batch_size` it is the smallest number that keeps each device at or below that many
    sequences, so that fewer devices take more steps and the batch stays the same. Otherwise it is
    `config.gradient_accumulation_steps`; if that is 1 and the devices are CPU devices that all hold the whole
    parameters, it is the smallest number that keeps each at or below `CORE_TOKENS`.

    Raises:
      UserError: when the devices cannot share the rows.
    """
    parts = batch_devices(mesh)
    rows, rest = divmod(config.batch_size, parts)
    if rest or not config.per_device_batch_size and rows % config.gradient_accumulation_steps:
        raise UserError(
            f"{parts} devices cannot share config.batch_size={config.batch_size} in "
            f"config.gradient_accumulation_steps={config.gradient_accumulation_steps} parts"
        )
    most = config.per_device_batch_size
    if (
        not most
        and config.gradient_accumulation_steps == 1
        and mesh.devices.flat[0].platform == "cpu"
        and _has_copies(mesh)
    ):
        most = max(1, CORE_TOKENS // config.seq_len)
    if not most:
        return config.gradient_accumulation_steps
    return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most)


def spec(*logical: str | None) -> PartitionSpec:
    """The partition of an array with the given logical axes."""
    return PartitionSpec(*(RULES[axis] for axis in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins the layout of an intermediate under `jax.set_mesh`; outside of it, or on one device's part of the
    arrays, it does nothing."""
    if not _divides(jax.sharding.get_abstract_mesh()):
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical))


def platform() -> str:
    """Of the devices that what is traced now is meant for: those of `jax.set_mesh`, else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def divided_by(logical: str) -> int:
    """Into how many parts a logical axis is still to be divided under `jax.set_mesh`; 1 outside of a mesh."""
    mesh, axes = jax.sharding.get_abstract_mesh(), RULES[logical]
    if not _divides(mesh):
        return 1
    return math.prod(mesh.shape.get(axis, 1) for axis in ([axes] if isinstance(axes, str) else axes))


def shard_mapped(
    function: Callable, inputs: Sequence[Sequence[str | None]], output: Sequence[str | None]
) -> Callable:
    """`function`, which GSPMD cannot divide, as one call a device, each on its own part of the arrays.

    Args:
      function: of arrays.
      inputs: logical axes of each of its arguments.
      output: logical axes of its result.
    """
    if not _divides(jax.sharding.get_abstract_mesh()):
        return function
    specs = tuple(spec(*logical) for logical in inputs)
    return jax.shard_map(function, in_specs=specs, out_specs=spec(*output), check_vma=False)


def summed_over_devices(function: Callable) -> Callable:
    """`function(params, rows) -> (sums, by_row)`, a call a device on its own rows, then one sum over devices.

    GSPMD would add up over devices wherever sums grow: in each layer of each microbatch. Where parameters
    are divided too that is left to it.
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
    """Whether there are several devices, all with the whole parameters."""
    return mesh.size > 1 and mesh.size == math.prod(mesh.shape[axis] for axis in _COPIES)


def _divides(mesh: jax.sharding.AbstractMesh) -> bool:
    """Whether arrays are whole here, and to be divided; not so outside of a mesh or in `jax.shard_map`."""
    return not mesh.empty and not mesh.manual_axes


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Numbers of the rows of a batch that this process's devices work on, in order."""
    parts = NamedSharding(mesh, spec("batch")).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in parts.values()]))


def shard_batch(mesh: Mesh, rows_Px: np.ndarray, batch_size: int | None = None) -> jax.Array:
    """A batch on the devices of all processes, of which each puts its own part there.

    Args:
      mesh: the mesh.
      rows_Px: the whole batch; or, with `batch_size`, only the rows of it that `process_rows` names.
      batch_size: B, rows of the whole batch.
    """
    row_P = np.arange(len(rows_Px)) if batch_size is None else process_rows(mesh, batch_size)
    batch_size = batch_size or len(rows_Px)

    def part(index) -> np.ndarray:
        start, stop, _ = index[0].indices(batch_size)
        return rows_Px[slice(*np.searchsorted(row_P, (start, stop)))]

    shape = (batch_size, *rows_Px.shape[1:])
    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec("batch")), part)


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of what every device, and so every process, holds whole."""
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
                f"config.mesh.{RULES[axis]}={parts} does not divide the {axis} dimension ({size}) of {name}"
            )
