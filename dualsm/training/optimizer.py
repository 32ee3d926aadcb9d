"""Muon for matrices inside the network, AdamW for the rest; or AdamW for everything."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import optax

from dualsm.devices.sharding import RULES, spec

OPTIMIZERS = ("muon", "adamw")


def make_optimizer(
    config: ml_collections.ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """The optimizer of a run.

    "muon" gives the matrices of the blocks and the head's projection to Muon (update scaled by
    0.2 * sqrt(max(A, B)), so that one learning rate and decay suit both; arXiv 2502.16982), and
    embeddings, output matrix and vectors to AdamW.

    Args:
      config: `config.optimizer`.
      schedule: learning rate by step.
    """
    adamw = optax.adamw(
        schedule, config.beta1, config.beta2, config.epsilon, weight_decay=config.weight_decay
    )
    if config.name == "adamw":
        optimizer = adamw
    else:
        muon = optax.contrib.muon(
            schedule,
            beta=config.momentum,
            weight_decay=config.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_matrices,
        )
        optimizer = optax.partition({"muon": _layers_apart(muon), "adamw": adamw}, _labels)
    if config.max_grad_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer)
    return optimizer


def at_step(state: optax.OptState, step: jax.Array) -> optax.OptState:
    """The optimizer's state with its schedules at a step of the run; optax's own count the updates made."""

    def set_count(part):
        return part._replace(count=step) if isinstance(part, optax.ScaleByScheduleState) else part

    return jax.tree.map(set_count, state, is_leaf=lambda part: isinstance(part, optax.ScaleByScheduleState))


def _layers_apart(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon with the matrices of a layer whole on one device, and the layers on different ones.

    Newton-Schulz needs whole matrices. Left alone, the compiler gathers all layers' on every device, once a
    product. Here each device updates its share of the layers; the rest is all-to-all, there and back.
    """

    def update(updates, state, params):
        mesh = jax.sharding.get_abstract_mesh()
        devices = 1 if mesh.empty else mesh.shape[RULES["layers"]]
        if devices == 1:
            return muon.update(updates, state, params)
        inputs = jax.tree.map(lambda x: _pad_layers(x, devices), (updates, state, params))
        specs = jax.tree.map(lambda x: spec("layers") if x.ndim == 3 else spec(), inputs)
        apart = jax.shard_map(muon.update, in_specs=specs, out_specs=specs[:2], check_vma=False)
        return jax.tree.map(
            lambda new, old: new[: len(old)] if old.ndim == 3 else new, apart(*inputs), (updates, state)
        )

    return optax.GradientTransformation(muon.init, update)


def _pad_layers(x: jax.Array, devices: int) -> jax.Array:
    """A stack of matrices filled up with zeros, so that all devices get equally many; others unchanged."""
    return jnp.pad(x, [(0, -len(x) % devices), (0, 0), (0, 0)]) if x.ndim == 3 else x


def _matrices(params):
    """The last two axes of a stack of matrices are the matrix."""
    return jax.tree.map(lambda p: optax.contrib.MuonDimensionNumbers(p.ndim - 2, p.ndim - 1), params)


def _labels(params):
    """ "muon" for kernels of the blocks and the head's projection, "adamw" for all else."""

    def label(path, _):
        names = [key.key for key in path]
        inside = names[0] == "blocks" or names[:2] == ["head", "projection"]
        return "muon" if inside and names[-1] == "kernel" else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)
