"""Sources of the training data (`config.sources`): corpora with their own shares, repetitions and mixtures.

A run without `config.sources` has one unnamed source, the corpus `config.data.path`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dualsm.objectives.mixture import check_shares
from dualsm.objectives.share_schedule import Point, schedule_points, shares_of_steps
from dualsm.process.errors import UserError
from dualsm.process.value_rules import ANY, FRACTION, Rule, at_least

RESERVED_NAMES = ("ema",)  # used in the names of metrics, such as valid/ema/causal/loss


class Source(NamedTuple):
    """A corpus that a run trains on.

    Attributes:
      name: name in `config.sources`; "" in a run without sources.
      corpus: path of the corpus.
      repetitions: R; 0 if it follows from `unique_tokens`.
      unique_tokens: U; 0 if it follows from `repetitions`.
      mixture: mixture of the source; None for `config.mixture`.
    """

    name: str
    corpus: str
    repetitions: int
    unique_tokens: int = 0
    mixture: Mapping[str, float] | None = None

    @property
    def key(self) -> str:
        """The config key of the source."""
        return f"config.sources.{self.name}" if self.name else "config"

    @property
    def corpus_key(self) -> str:
        """The config key of the path of the corpus."""
        return f"{self.key}.corpus" if self.name else "config.data.path"

    def unique(self, budget: int) -> int:
        """Returns the number of unique tokens in a budget of training tokens from the source."""
        return self.unique_tokens or -(-budget // self.repetitions)


class SourceKey(NamedTuple):
    """A key of `config.sources.NAME`. The type of the default is the type of the key."""

    default: Any
    rule: Rule
    doc: str


# In addition to these keys, `mixture` maps objectives and pairs to their shares of the source's rows.
KEYS = {
    "corpus": SourceKey("", ANY, "Corpus, the output of `python -m dualsm.prepare`."),
    "share": SourceKey(0.0, FRACTION, "Share of the rows; the shares of all sources sum to 1."),
    "repetitions": SourceKey(0, at_least(0), "R, passes over the unique tokens; 0: see unique_tokens."),
    "unique_tokens": SourceKey(0.0, at_least(0), "U, first tokens of the corpus; 0: see repetitions."),
    "identity": SourceKey("", ANY, "Hash of the corpus; set by the run, which resumes only on this corpus."),
}
_DEFAULTS = {name: key.default for name, key in KEYS.items()}


def default_source_options(sources: Mapping[str, Any], entries: Sequence[str]) -> dict[str, Any]:
    """Returns the default of every key of `config.sources`, by dotted key.

    Args:
      sources: the sources, by name.
      entries: objectives and pairs, which a source's own mixture may contain.

    Raises:
      UserError: if the name of a source is reserved or not an identifier, or a source is not a mapping.
    """
    found = {}
    for name, options in sources.items():
        where = f"config.sources.{name}"
        if name in entries or name in RESERVED_NAMES or not name.isidentifier():
            raise UserError(
                f"{where}: choose another name, a Python identifier that is not the name of an objective or "
                f"pair, or {', '.join(RESERVED_NAMES)}"
            )
        if not isinstance(options, Mapping):
            raise UserError(f"{where}={options!r} must set {', '.join(_DEFAULTS)} and, optionally, mixture")
        found |= {f"sources.{name}.{key}": value for key, value in _DEFAULTS.items()}
        found |= {f"sources.{name}.mixture.{entry}": 0.0 for entry in entries}
    return found


def check_sources(config: ConfigDict) -> None:
    """Raises `UserError`, naming the key, for invalid values. Keys and types must be valid."""
    if not config.sources:
        if config.sources_schedule.name != "constant" or config.sources_schedule.path:
            raise UserError(
                f"config.sources_schedule.name={config.sources_schedule.name} has no effect without "
                "config.sources; leave it at constant, with an empty path"
            )
        return
    if config.data.path:
        raise UserError(
            f"config.data.path={config.data.path} is set beside config.sources; set only one of them"
        )
    if config.repetitions != 1:
        raise UserError(
            f"config.repetitions={config.repetitions} has no effect with config.sources; set it to 1, and "
            "config.sources.NAME.repetitions of each source"
        )
    for name, values in config.sources.items():
        where, options = f"config.sources.{name}", _DEFAULTS | dict(values)
        for key, (_, rule, _) in KEYS.items():
            rule.check(f"{where}.{key}", options[key])
        if not options["corpus"]:
            raise UserError(f"{where}.corpus is empty; set it to the path of a corpus")
        if options["unique_tokens"] % 1:
            raise UserError(f"{where}.unique_tokens={options['unique_tokens']} must be a whole number")
        if bool(options["repetitions"]) == bool(options["unique_tokens"]):
            raise UserError(
                f"{where}: repetitions={options['repetitions']} and "
                f"unique_tokens={options['unique_tokens']:g}; set one of them, and leave the other at 0"
            )
        if mixture := _own_mixture(values):
            check_shares(mixture, [*config.pairs], f"{where}.mixture")
    _source_points(config)
    if config.mixture_schedule.name != "constant" and all(s.mixture for s in trained_sources(config)):
        raise UserError(
            f"config.mixture_schedule.name={config.mixture_schedule.name} has no effect, because every "
            "source has a mixture of its own; leave it at constant, or clear the mixture of a source"
        )


def _own_mixture(options: Mapping) -> Mapping[str, float] | None:
    mixture = dict(options.get("mixture", {}))
    return mixture if any(mixture.values()) else None


def _source_points(config: ConfigDict) -> list[Point]:
    def check(shares: Mapping[str, float]) -> None:
        for name in shares.keys() - config.sources.keys():
            raise UserError(f"unknown source {name!r}; choose from {', '.join(sorted(config.sources))}")
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise UserError(f"config.sources.{name}.share={share:g} must be in [0, 1]")
        total = sum(shares.values())
        if abs(total - 1) > 1e-6:
            listed = ", ".join(f"{name}={share:g}" for name, share in sorted(shares.items()))
            raise UserError(
                f"the shares of config.sources sum to {total:g} ({listed}); the shares must sum to 1"
            )

    shares = {name: options.get("share", _DEFAULTS["share"]) for name, options in config.sources.items()}
    names = sorted(shares)
    example = f"0.5 {names[0]}=0.25 {names[-1]}=0.75" if len(names) > 1 else f"1 {names[0]}=1"
    return schedule_points(shares, config.sources_schedule, "config.sources_schedule", example, check)


def trained_sources(config: ConfigDict) -> list[Source]:
    """Returns the sources with a positive share at some step, sorted by name."""
    if not config.sources:
        return [Source("", config.data.path, config.repetitions)]
    path, found = _source_points(config), []
    for name in sorted(config.sources):  # the order of a dict is lost when the config is saved
        options = _DEFAULTS | dict(config.sources[name])
        if any(point.shares.get(name, 0) > 0 for point in path):
            found.append(
                Source(
                    name,
                    options["corpus"],
                    options["repetitions"],
                    int(options["unique_tokens"]),
                    _own_mixture(options),
                )
            )
    return found


def source_shares(config: ConfigDict, sources: Sequence[Source]) -> np.ndarray:
    """Returns each source's share of the rows at each step, float64 [S, O]."""
    if not config.sources:
        return np.ones((config.steps, 1))
    names = [source.name for source in sources]
    return shares_of_steps(_source_points(config), config.sources_schedule.name, config.steps, names)
