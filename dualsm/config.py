"""Configs: defaults, checks, and reading and writing.

A config in `configs/` starts from `default_config()` and changes some keys. Every key can be overridden on
the command line (`--config.model.d_model=512`); unknown keys are rejected.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from dualsm.config_keys import FILLED_IN, FREE_KEYS, KEYS
from dualsm.model.head_shapes import check_heads
from dualsm.model.rope import check_rope_scaling
from dualsm.objectives.pairs import check_pairs, default_member_options, default_pairs
from dualsm.objectives.plan import count_sequences
from dualsm.objectives.registry import OBJECTIVES, check_options, default_options
from dualsm.objectives.shares import check_mixture
from dualsm.objectives.sources import check_sources, default_source_options
from dualsm.optimizers.optimizer import check_optimizer
from dualsm.optimizers.schedules import check_schedule
from dualsm.process.errors import WHERE_KEYS_ARE_LISTED, UserError


class OldVersion(UserError):
    """A run was made by a version of dualsm that this one cannot read."""


def default_config() -> ConfigDict:
    """Returns a config with the default of every key, also of the objectives and pairs."""
    config = ConfigDict(unflatten_dict({key.name: key.default for key in KEYS}, sep="."))
    config.pairs = ConfigDict(default_pairs())
    config.mixture = ConfigDict(dict.fromkeys([*OBJECTIVES, *config.pairs], 0.0) | {"causal": 1.0})
    config.objectives = ConfigDict(default_options())
    config.sources = ConfigDict()
    return config


def parse_arg(arg: str | None, **types: Callable) -> dict:
    """Parses the argument of a config, as in `--config=FILE:name=value,name=value`.

    Args:
      arg: the argument of `get_config`.
      **types: name -> conversion of its value.

    Returns:
      name -> value, for the names that the argument contains.

    Raises:
      UserError: for an unknown name or an invalid value.
    """
    values = {}
    for part in filter(None, (arg or "").split(",")):
        name, _, text = part.partition("=")
        if name not in types:
            raise UserError(f"--config: unknown argument {name!r}; this config takes {', '.join(types)}")
        try:
            values[name] = types[name](text)
        except ValueError as error:
            raise UserError(f"--config: {name}={text!r} is not of type {types[name].__name__}") from error
    return values


def set_alpha(config: ConfigDict, alpha: float) -> None:
    """Sets the dual mixture: a share `alpha` of causal rows and a share 1 - alpha of masked diffusion."""
    config.mixture = ConfigDict(dict.fromkeys(config.mixture, 0.0))
    config.mixture.causal, config.mixture.masked_diffusion = alpha, 1 - alpha


def add_pair(config: ConfigDict, name: str, share: float = 0.0, **members: Mapping[str, Any]) -> None:
    """Adds a pair of objectives to `config.pairs`, and its share to the mixture.

    Args:
      config: modified in place.
      name: name of the pair.
      share: share of the rows; the shares of the mixture must sum to 1.
      **members: objective -> its loss weight `weight`, and options that differ from `config.objectives`.

    Raises:
      UserError: if `name` is a predefined pair.
    """
    if name in default_pairs():
        raise UserError(f"config.pairs.{name} is predefined; change its options or choose another name")
    config.pairs[name] = ConfigDict({objective: dict(options) for objective, options in members.items()})
    config.mixture[name] = share


def add_source(
    config: ConfigDict,
    name: str,
    corpus: str = "",
    share: float = 0.0,
    repetitions: int = 0,
    unique_tokens: float = 0,
    mixture: Mapping[str, float] | None = None,
) -> None:
    """Adds a source to `config.sources`, with all its keys, so that each can be overridden.

    Args:
      config: modified in place; call `add_pair` first, so that the mixture has a key per pair.
      name: name of the source.
      corpus: path of its corpus.
      share: share of the rows of the batch; the shares of all sources must sum to 1.
      repetitions: R of the source.
      unique_tokens: U of the source; set either `unique_tokens` or `repetitions`.
      mixture: its own mixture; None for `config.mixture`.
    """
    defaults = unflatten_dict(default_source_options({name: {}}, [*config.mixture]), sep=".")
    config.sources[name] = ConfigDict(defaults["sources"][name])
    config.sources[name].update(
        corpus=corpus, share=float(share), repetitions=repetitions, unique_tokens=float(unique_tokens)
    )
    config.sources[name].mixture.update({key: float(value) for key, value in (mixture or {}).items()})


def check_config(config: ConfigDict) -> None:
    """Raises `UserError`, naming the key, for invalid values and for values that do not fit together."""
    _check_keys(config)
    check_options(config.objectives)
    check_pairs(config)
    check_sources(config)
    check_mixture(config)
    _check_batch(config)
    check_heads(config.model)
    check_rope_scaling(config.model.rope_scaling)
    check_schedule(config.optimizer.schedule, config.steps)
    check_optimizer(config.optimizer)
    if config.valid.parameters != "last" and not config.ema.decay:
        raise UserError(
            f"config.valid.parameters={config.valid.parameters} needs a moving average of the weights; set "
            "config.ema.decay, or leave valid.parameters at last"
        )
    for name in valid_objectives(config):
        if name not in OBJECTIVES:
            raise UserError(
                f"config.valid.objectives: unknown objective {name!r}; choose from {', '.join(OBJECTIVES)}"
            )
    if config.start.step >= 0 and not config.start.run:
        raise UserError(
            f"config.start.step={config.start.step} needs config.start.run; set it, or leave start.step at -1"
        )


def _check_keys(config: ConfigDict) -> None:
    """Checks that all keys exist, have the type of their default and a valid value."""
    defaults = flatten_dict(default_config().to_dict(), sep=".")
    values = flatten_dict(config.to_dict(), sep=".")
    if isinstance(pairs := config.get("pairs"), ConfigDict):
        defaults |= default_member_options(pairs.to_dict()) | {f"mixture.{name}": 0.0 for name in pairs}
    source_defaults = _source_defaults(config)
    defaults |= {key: value for key, value in source_defaults.items() if key in values}
    for key in values.keys() - defaults.keys():
        raise UserError(f"unknown config key config.{key}; {WHERE_KEYS_ARE_LISTED}")
    for key, default in defaults.items():
        where = f"config.{key}"
        if key not in values:
            raise UserError(f"{where} is missing; start the config from dualsm.config.default_config()")
        value = values[key]
        if not _same_type(default, value):
            wanted = type(default).__name__
            raise UserError(f"{where}={value!r} must be of type {wanted}, not {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}={value!r} must be finite")
        if isinstance(default, int) and abs(value) >= 2**31:
            raise UserError(f"{where}={value!r} must be less than 2^31")
    for key in KEYS:
        key.rule.check(f"config.{key.name}", values[key.name])


def _source_defaults(config: ConfigDict) -> dict[str, Any]:
    """Returns the default of every key of the sources of a config, by dotted key."""
    sources = config.get("sources")
    if not isinstance(sources, ConfigDict):
        return {}
    return default_source_options(sources.to_dict(), [*OBJECTIVES, *config.get("pairs", {})])


def _same_type(default, value) -> bool:
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(default) is type(value)


def _check_batch(config: ConfigDict) -> None:
    rows = config.steps * config.batch_size
    # Counting takes seconds for a long run with pairs, each of whose sequences has two rows.
    if config.repetitions > rows // 2 and config.repetitions > (sequences := count_sequences(config)):
        raise UserError(
            f"config.repetitions={config.repetitions} must not exceed the {sequences} sequences of the run "
            "(steps * batch_size; the two rows of a pair count once)"
        )
    if config.batch_size * config.seq_len > 2**30:
        raise UserError(
            f"config.batch_size={config.batch_size} times config.seq_len={config.seq_len} must not exceed "
            "2^30 tokens per step"
        )
    if config.batch_size % config.gradient_accumulation_steps:
        raise UserError(
            f"config.gradient_accumulation_steps={config.gradient_accumulation_steps} must divide "
            f"config.batch_size={config.batch_size}"
        )


def check_installed(config: ConfigDict) -> None:
    """Raises `UserError` if the config needs a package that is not installed."""
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config.log.wandb={config.log.wandb!r} needs wandb, which is not installed: "
            "pip install 'dualsm[wandb]'"
        )


def valid_objectives(config: ConfigDict) -> list[str]:
    """Returns the objectives that validation scores."""
    return [name for name in config.valid.objectives.split(",") if name]


def save_config(config: ConfigDict) -> str:
    """Returns the config as JSON text."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n"


def load_config(text: str) -> ConfigDict:
    """Returns the config of a run from its JSON text.

    Raises:
      OldVersion: if the run was made by dualsm 0.1, whose config keys had other names.
    """
    config = json.loads(text)
    if "batch_rows" in config:
        raise OldVersion(
            "the run was made by dualsm 0.1, whose config keys had other names; open it with 0.1"
        )
    return ConfigDict(config)


def difference(a: ConfigDict, b: ConfigDict, free: Sequence[str] = FREE_KEYS) -> list[str]:
    """Returns the changes that prevent a run of config `a` from resuming with config `b`.

    Args:
      a: config of the run.
      b: config to resume with; keys with a value in `FILLED_IN` are ignored.
      free: keys, or sections, that may change.

    Returns:
      One text "key: old -> new" per changed key.
    """
    flat_a, flat_b = (_source_defaults(config) | flatten_dict(config.to_dict(), sep=".") for config in (a, b))
    changes = []
    for key in sorted(flat_a.keys() | flat_b.keys()):
        old, new = flat_a.get(key), flat_b.get(key)
        pattern = re.sub(r"^sources\.\w+\.", "sources.*.", key)
        is_free = any(pattern == name or pattern.startswith(name + ".") for name in free)
        if new not in (old, FILLED_IN.get(pattern, old)) and not is_free:
            changes.append(f"{key}: {old} -> {new}")
    return changes


def freeze(config: ConfigDict) -> ml_collections.FrozenConfigDict:
    """Returns an immutable, hashable copy of a config."""
    return ml_collections.FrozenConfigDict(config)
