"""Meshes over several machines and slices, with stubs of devices."""

from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest

from dualsm.devices import sharding
from dualsm.process.errors import UserError


@dataclass(frozen=True)
class Device:
    """Attributes of a device that determine the mesh."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def gpus(nodes: int, each: int = 4) -> list[Device]:
    """Returns GPUs with one process each, in the order of JAX."""
    return [Device(i, "gpu", "NVIDIA H100 80GB HBM3", i, i // each) for i in range(nodes * each)]


def tpus(slices: int, kind: str = "TPU v4", shape: tuple[int, int, int] = (2, 2, 2)) -> list[Device]:
    """Returns TPU slices of the same shape with one process each."""
    found = []
    for number in range(slices):
        for z, y, x in np.ndindex(*reversed(shape)):
            found.append(Device(len(found), "tpu", kind, number, number, (x, y, z)))
    return found


def mesh(devices: list[Device], **sizes: int) -> jax.sharding.Mesh:
    return sharding.make_mesh({"replica": 1, "data": 1, "fsdp": 1, "tensor": 1} | sizes, devices)


def slices_along(devices_RxDxFxT: np.ndarray, axis: str) -> set[int]:
    """Returns the numbers of slices along the lines of an axis."""
    position = sharding.AXES.index(axis)
    lines = np.moveaxis(devices_RxDxFxT, position, -1).reshape(-1, devices_RxDxFxT.shape[position])
    return {len({device.slice_index for device in line}) for line in lines}


@pytest.mark.parametrize("cyclic", [False, True], ids=["node by node", "round the nodes"])
def test_last_axes_are_within_a_node_of_gpus(cyclic):
    devices = gpus(nodes=2)
    if cyclic:  # SLURM may distribute processes cyclically
        devices = [replace(device, slice_index=device.id % 2) for device in devices]
    made = mesh(devices, data=2, fsdp=2, tensor=2)
    assert set(made.devices.flat) == set(devices)
    assert slices_along(made.devices, "tensor") == slices_along(made.devices, "fsdp") == {1}
    assert slices_along(made.devices, "data") == {2}
    for node in (0, 1):  # in order
        ids = [device.id for device in made.devices.flat if device.slice_index == node]
        assert ids == sorted(ids)


def test_an_axis_may_span_all_nodes_of_gpus():
    made = mesh(gpus(nodes=3), fsdp=-1)
    assert [device.id for device in made.devices.flat] == list(range(12))


@pytest.mark.parametrize("replica", [2, 4, -1])
@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite"])
def test_only_replica_spans_several_tpu_slices(kind, replica):
    devices = tpus(2, kind, (4, 2, 1) if kind == "TPU v5 lite" else (2, 2, 2))
    tensor = 8 // max(replica, 2)
    made = mesh(devices, replica=replica, fsdp=2, tensor=tensor)
    assert set(made.devices.flat) == set(devices)
    assert made.shape["replica"] == 16 // (2 * tensor)
    assert slices_along(made.devices, "replica") == {2}
    assert slices_along(made.devices, "fsdp") == slices_along(made.devices, "tensor") == {1}


@pytest.mark.parametrize(
    ("slices", "sizes"), [(2, {"fsdp": 16}), (2, {"data": -1}), (3, {"replica": 2, "data": 12})]
)
def test_other_axes_across_slices_are_rejected(slices, sizes):
    with pytest.raises(UserError, match=f"{slices} slices, and replica must be {slices} or a multiple"):
        mesh(tpus(slices), **sizes)


def test_single_tpu_slice_uses_the_mesh_of_jax():
    devices = tpus(1)
    expected = jax.make_mesh((1, 2, 4, 1), sharding.AXES, devices=devices)
    assert mesh(devices, data=2, fsdp=4).devices.tolist() == expected.devices.tolist()


def test_devices_without_slice_index_keep_their_order():
    assert mesh(jax.devices(), data=2, tensor=4).devices.ravel().tolist() == jax.devices()
