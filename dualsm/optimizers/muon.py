"""Muon for the matrices inside the network, AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
import optax

from dualsm.devices.sharding import RULES, spec
from dualsm.optimizers.adamw import make_adamw


def make_muon(config: ml_collections.ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns Muon for the kernels of the blocks and of the head's projection, AdamW for all else.

    Muon's updates of an [A, B] matrix are scaled by 0.2 * sqrt(max(A, B)), so that one learning rate and one
    weight decay suit both optimizers (arXiv 2502.16982).

    Args:
      config: `config.optimizer`.
      schedule: learning rate by step.
    """
    muon = optax.contrib.muon(
        schedule,
        beta=config.momentum,
        weight_decay=config.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrix_axes,
    )
    ratio = (config.adamw_learning_rate or config.learning_rate) / config.learning_rate
    adamw = make_adamw(config, schedule if ratio == 1 else lambda step: schedule(step) * ratio)
    return optax.partition({"muon": _shard_layers(muon), "adamw": adamw}, _labels)


def muon_peak(config: ml_collections.ConfigDict, names: Sequence[str]) -> float:
    """Returns the peak learning rate of the parameter with the path `names`."""
    return config.learning_rate if _uses_muon(names) else config.adamw_learning_rate or config.learning_rate


def _uses_muon(names: Sequence[str]) -> bool:
    """Returns True for the path of a kernel of the blocks or of the head's projection."""
    return names[-1] == "kernel" and (names[0] == "blocks" or names[:2] == ["head", "projection"])


def _shard_layers(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """Shards the update over layers, so that each device has whole matrices.

    Newton-Schulz iterations need whole matrices. GSPMD would gather the matrices of all layers on each device
    for every product. Here each device updates its share of the layers, with one all-to-all before and after.
    """

    def update(updates, state, params):
        mesh = jax.sharding.get_abstract_mesh()
        devices = 1 if mesh.empty else mesh.shape[RULES["layers"]]
        if devices == 1:
            return muon.update(updates, state, params)
        inputs = jax.tree.map(lambda x: _pad_layers(x, devices), (updates, state, params))
        specs = jax.tree.map(lambda x: spec("layers") if x.ndim == 3 else spec(), inputs)
        sharded_update = jax.shard_map(muon.update, in_specs=specs, out_specs=specs[:2], check_vma=False)
        return jax.tree.map(
            lambda new, old: new[: len(old)] if old.ndim == 3 else new,
            sharded_update(*inputs),
            (updates, state),
        )

    return optax.GradientTransformation(muon.init, update)


def _pad_layers(x: jax.Array, devices: int) -> jax.Array:
    """Pads a stack of matrices with zeros to a multiple of `devices`; returns other arrays unchanged."""
    return jnp.pad(x, [(0, -len(x) % devices), (0, 0), (0, 0)]) if x.ndim == 3 else x


def _matrix_axes(params):
    """Declares, for Optax, the last two axes of each parameter as its matrix axes."""
    return jax.tree.map(lambda p: optax.contrib.MuonDimensionNumbers(p.ndim - 2, p.ndim - 1), params)


def _labels(params):
    """Returns "muon" or "adamw" for each parameter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if _uses_muon([key.key for key in path]) else "adamw", params
    )
