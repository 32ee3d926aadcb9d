"""All config keys with their units and reasons, and the checks made before anything is compiled.

A recipe in `configs/` starts from `default_config()` and changes what it needs. Every key can be overridden
on the command line (`--config.model.d_model=512`); keys that are not listed here are refused.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence

import ml_collections
from ml_collections import ConfigDict

from dualsm.objectives.registry import OBJECTIVES, check_options, default_options
from dualsm.objectives.shares import SCHEDULES as MIXTURE_SCHEDULES
from dualsm.objectives.shares import check_mixture
from dualsm.process.errors import UserError


class OldVersion(UserError):
    """A run was made by a version of dualsm that this one cannot read."""


def default_config() -> ConfigDict:
    """A complete config; the values are those of the paper (arXiv 2512.14549) where it has them."""
    config = ConfigDict()

    config.seed = 0  # weights, order of documents and corruption all follow from it
    config.steps = 1000  # optimizer steps of the run
    config.batch_size = 64  # sequences per step, over all devices
    config.seq_len = 256  # L, tokens per sequence
    config.repetitions = 1  # R, how often the run sees each of its unique tokens
    config.gradient_accumulation_steps = 1  # does not change the result
    # Maximum number of sequences per device; 0 derives it from `gradient_accumulation_steps`, or from the
    # cache size on a CPU (`sharding.accumulation_steps`).
    config.per_device_batch_size = 0

    config.max_consecutive_skips = 20  # stop after this many consecutive non-finite updates

    # Share of rows by objective; must sum to 1.
    config.mixture = ConfigDict(dict.fromkeys(OBJECTIVES, 0.0) | {"causal": 1.0})

    # How the shares change over the run: "constant", "linear" between points, or in "steps" at them. The
    # path lists the points after the start, as in "0.5 causal=0.25 masked_diffusion=0.75; 1 causal=1".
    config.mixture_schedule = ConfigDict({"name": "constant", "path": ""})

    # Options of the objectives, explained in docs/objectives.md. `weight` is a factor on the loss of its
    # rows (the paper's released models were trained with 2.0 for causal rows).
    config.objectives = ConfigDict(default_options())

    config.data = ConfigDict()
    config.data.path = ""  # folder made by `python -m dualsm.prepare`
    config.data.identity = ""  # hash of the corpus; filled in by the run, so that it resumes on the same one
    config.data.verify = True  # check the hashes of all its files before the first step
    config.data.num_threads = 1  # that read ahead
    config.data.prefetch_steps = 4  # steps read ahead

    config.model = ConfigDict()
    config.model.num_layers = 4
    config.model.d_model = 256  # D, of the residual stream
    config.model.num_heads = 4  # H; must divide the width into an even head width
    config.model.d_ff = 704  # F, inner width of SwiGLU
    config.model.vocab_size = 0  # ids; 0 takes the corpus's, another number must equal it
    config.model.head = "projected"  # the paper's; or "plain", Llama's: no projection, no bias
    config.model.rope_theta = 160_000.0
    config.model.norm_eps = 1e-7
    config.model.dtype = "float32"  # of computation ("bfloat16" on accelerators); weights stay float32
    # What the forward pass keeps for the backward: the results of "matmuls" and attention, nothing ("full"),
    # or all ("none"). On CPU "matmuls" is the fastest, and on accelerators it saves memory.
    config.model.remat = "matmuls"
    config.model.attention = "auto"  # "splash" on TPUs, "flash" on GPUs, else "xla"; see model/attention.py

    config.loss = ConfigDict()
    config.loss.z_loss = 1e-4  # weight of the squared log normaliser
    config.loss.chunk_size = 128  # positions a row whose logits are held at once

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"  # or "adamw"
    config.optimizer.learning_rate = 7e-3  # peak
    config.optimizer.weight_decay = 0.1  # times the learning rate, a step
    config.optimizer.momentum = 0.95  # of Muon
    config.optimizer.beta1 = 0.9  # of AdamW
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon = 1e-8
    config.optimizer.max_grad_norm = 0.0  # of the whole gradient; 0 does not clip
    config.optimizer.schedule = ConfigDict()
    config.optimizer.schedule.name = "wsd"  # or "cosine", "infinite"; see dualsm/training/schedules.py
    config.optimizer.schedule.warmup_steps = 0  # steps
    config.optimizer.schedule.decay_fraction = 0.25  # share of the run at its end (wsd, infinite)
    config.optimizer.schedule.final_fraction = 0.0  # learning rate at the end, over the peak
    config.optimizer.schedule.cooldown_steps = 0  # steps from the peak to the constant phase (infinite)
    config.optimizer.schedule.constant_fraction = 0.5  # learning rate of that phase, over the peak (infinite)

    config.mesh = ConfigDict()  # devices along each axis; -1 takes all that are left
    config.mesh.replica = 1  # copies across slices
    config.mesh.data = -1  # copies that share the rows
    config.mesh.fsdp = 1  # share the rows, and split the parameters
    config.mesh.tensor = 1  # split heads, MLP and vocabulary

    config.start = ConfigDict()  # branch off another run instead of starting from random weights
    config.start.run = ""  # its folder; weights, optimizer and step number are taken over
    config.start.step = -1  # of its checkpoint; -1: the newest at the first start, filled in by the run

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 100  # steps
    config.checkpoint.max_to_keep = 2  # newest ones kept
    config.checkpoint.max_failed_saves = (
        3  # saves in a row that may fail (a full disk) before the run gives up
    )
    config.checkpoint.final_retries = 8  # of the last save when it fails, after pauses of 1, 2, 4, ... s
    config.checkpoint.keep_period = 0  # those at multiples of this many steps are kept for good; 0: none

    config.valid = ConfigDict()
    config.valid.every = 100  # steps; also after the last, and before the first (an eighth of the rows)
    config.valid.num_sequences = 1024  # most held-out rows scored; 0: all
    config.valid.objectives = "causal,prefix,masked_diffusion"  # scored whether trained on or not; "": none

    config.log = ConfigDict()
    config.log.every = 10  # steps a log line; losses are means over them
    config.log.tensorboard = True
    config.log.wandb = ""  # project to log to; empty: do not

    return config


# Keys that may change when a run is resumed: none of them changes what is learned.
FREE_KEYS = (
    "checkpoint", "data.prefetch_steps", "data.path", "data.num_threads", "data.verify", "log", "mesh",
    "per_device_batch_size", "gradient_accumulation_steps", "model.attention", "model.remat",
    "max_consecutive_skips", "valid.every",
)  # fmt: skip

# Keys that a run fills in, and what leaves them open.
FILLED_IN = {"data.identity": "", "model.vocab_size": 0, "start.step": -1}


def parse_arg(arg: str | None, **types: Callable) -> dict:
    """The values in `--config=FILE:name=value,name=value`.

    Args:
      arg: what `get_config` was called with.
      **types: name -> how to read its value.

    Raises:
      UserError: for an unknown name or an unreadable value.
    """
    values = {}
    for part in filter(None, (arg or "").split(",")):
        name, _, text = part.partition("=")
        if name not in types:
            raise UserError(f"--config: unknown argument {name!r}; this config takes {', '.join(types)}")
        try:
            values[name] = types[name](text)
        except ValueError as error:
            raise UserError(f"--config: {name}={text!r} is no {types[name].__name__}") from error
    return values


def set_alpha(config: ConfigDict, alpha: float) -> None:
    """Sets the dual mixture: a share `alpha` of causal rows, the rest masked diffusion."""
    config.mixture = ConfigDict(dict.fromkeys(config.mixture, 0.0))
    config.mixture.causal, config.mixture.masked_diffusion = alpha, 1 - alpha


def check_config(config: ConfigDict) -> None:
    """Raises `UserError`, naming the key, for values that cannot be or do not fit together."""
    from dualsm.model import remat
    from dualsm.model.attention import BACKENDS
    from dualsm.model.transformer import HEADS
    from dualsm.training.optimizer import OPTIMIZERS
    from dualsm.training.schedules import SCHEDULES

    _check_shape(config, default_config(), "config")
    for key in (
        "steps", "batch_size", "seq_len", "repetitions", "gradient_accumulation_steps", "data.num_threads",
        "data.prefetch_steps", "model.num_layers", "model.d_model", "model.num_heads", "model.d_ff",
        "loss.chunk_size", "checkpoint.every", "checkpoint.max_to_keep", "max_consecutive_skips",
        "valid.every", "log.every",
    ):  # fmt: skip
        _require(config, key, lambda v: v >= 1, "must be at least 1")
    for key in (
        "seed", "per_device_batch_size", "model.vocab_size", "loss.z_loss", "optimizer.weight_decay",
        "optimizer.max_grad_norm", "optimizer.schedule.warmup_steps", "optimizer.schedule.cooldown_steps",
        "optimizer.schedule.final_fraction", "checkpoint.keep_period", "checkpoint.max_failed_saves",
        "checkpoint.final_retries", "valid.num_sequences",
    ):  # fmt: skip
        _require(config, key, lambda v: v >= 0, "must not be negative")
    for key in ("optimizer.learning_rate", "optimizer.epsilon", "model.rope_theta", "model.norm_eps"):
        _require(config, key, lambda v: v > 0, "must be positive")
    for key in ("optimizer.momentum", "optimizer.beta1", "optimizer.beta2"):
        _require(config, key, lambda v: 0 <= v < 1, "must lie in [0, 1)")
    _require(config, "optimizer.schedule.decay_fraction", lambda v: 0 <= v <= 1, "must lie in [0, 1]")
    for key, known in (
        ("model.dtype", ("float32", "bfloat16")),
        ("model.head", HEADS),
        ("model.remat", remat.POLICIES),
        ("model.attention", BACKENDS),
        ("optimizer.name", OPTIMIZERS),
        ("optimizer.schedule.name", SCHEDULES),
        ("mixture_schedule.name", MIXTURE_SCHEDULES),
    ):
        _require(config, key, lambda v, known=known: v in known, f"must be one of {', '.join(known)}")

    check_options(config.objectives)
    check_mixture(config)
    _require(config, "steps", lambda v: v <= 10**7, "must be at most ten million")
    if config.repetitions > config.steps * config.batch_size:
        raise UserError(
            f"config.repetitions={config.repetitions} leaves less than one row of unique tokens of the run's "
            f"{config.steps * config.batch_size} rows"
        )
    tokens = config.batch_size * config.seq_len
    if tokens > 2**30:
        raise UserError(
            f"config.batch_size={config.batch_size} times config.seq_len={config.seq_len} is more than "
            "2^30 tokens a step"
        )
    for name in valid_objectives(config):
        if name not in OBJECTIVES:
            raise UserError(f"config.valid.objectives: {name!r} is none of {', '.join(OBJECTIVES)}")
    model = config.model
    if model.d_model % model.num_heads or model.d_model // model.num_heads % 2:
        raise UserError(
            f"config.model.num_heads={model.num_heads} must divide config.model.d_model={model.d_model} "
            "into heads of even width"
        )
    if config.batch_size % config.gradient_accumulation_steps:
        raise UserError(
            f"config.gradient_accumulation_steps={config.gradient_accumulation_steps} does not divide "
            f"config.batch_size={config.batch_size}"
        )
    if config.start.step < -1 or (config.start.step >= 0 and not config.start.run):
        raise UserError(
            f"config.start.step={config.start.step} must be a checkpoint's of config.start.run, or -1"
        )
    schedule = config.optimizer.schedule
    decay = round(schedule.decay_fraction * config.steps) if schedule.name != "cosine" else 0
    cooldown = schedule.cooldown_steps if schedule.name == "infinite" else 0
    if schedule.warmup_steps + cooldown + decay > config.steps:
        raise UserError(
            f"config.optimizer.schedule: warmup ({schedule.warmup_steps}), cooldown ({cooldown}) and decay "
            f"({decay}) together are longer than config.steps={config.steps}"
        )
    if schedule.name == "infinite" and not 0 < schedule.final_fraction <= schedule.constant_fraction <= 1:
        raise UserError(
            f"config.optimizer.schedule: final_fraction={schedule.final_fraction} and "
            f"constant_fraction={schedule.constant_fraction} must satisfy 0 < final_fraction <= "
            "constant_fraction <= 1 for the infinite schedule"
        )


def check_installed(config: ConfigDict) -> None:
    """Raises `UserError` when a package is missing that the config asks for."""
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("config.log.wandb is set but wandb is not installed: pip install 'dualsm[wandb]'")


def valid_objectives(config: ConfigDict) -> list[str]:
    """The objectives that validation scores."""
    return [name for name in config.valid.objectives.split(",") if name]


def save_config(config: ConfigDict) -> str:
    """The config as JSON text."""
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
    """What keeps a run of config `a` from going on with config `b`, one "key: old -> new" each.

    What `b` leaves open for the run to fill in, and the keys `free`, are no difference.
    """
    flat_a, flat_b = _flat(a), _flat(b)
    return [
        f"{key}: {flat_a.get(key)} -> {flat_b.get(key)}"
        for key in sorted(flat_a.keys() | flat_b.keys())
        if flat_b.get(key) not in (flat_a.get(key), FILLED_IN.get(key, flat_a.get(key)))
        and not any(key == name or key.startswith(name + ".") for name in free)
    ]


def _flat(config: ConfigDict, prefix: str = "") -> dict:
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key: value}
    return flat


def _check_shape(config: ConfigDict, default: ConfigDict, where: str) -> None:
    """Raises `UserError` unless `config` has the keys and types of `default`."""
    for key in default:
        if key not in config:
            raise UserError(f"{where}.{key} is missing; start the config from dualsm.config.default_config()")
    for key, value in config.items():
        if key not in default:
            raise UserError(f"unknown config key {where}.{key}; see dualsm/config.py for all keys")
        if isinstance(default[key], ConfigDict) and isinstance(value, ConfigDict):
            _check_shape(value, default[key], f"{where}.{key}")
        elif not _same_type(default[key], value):
            wanted = type(default[key]).__name__
            raise UserError(f"{where}.{key}={value!r} must be of type {wanted}, not {type(value).__name__}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}.{key}={value!r} must be finite")
        elif isinstance(value, int) and abs(value) >= 2**31:
            raise UserError(f"{where}.{key}={value!r} must be less than 2^31")


def _same_type(default, value) -> bool:
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(default) is type(value)


def _require(config: ConfigDict, key: str, holds: Callable[..., bool], rule: str) -> None:
    value = config
    for name in key.split("."):
        value = value[name]
    if not holds(value):
        raise UserError(f"config.{key}={value} {rule}")


def freeze(config: ConfigDict) -> ml_collections.FrozenConfigDict:
    """An unchangeable copy, to be handed to the parts of a run."""
    return ml_collections.FrozenConfigDict(config)
