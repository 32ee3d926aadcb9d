"""Log-likelihood of a completion after a context, in every mode a dual model can be used in.

Whatever the mode, an item becomes rows of one form: tokens, how far the bidirectional part reaches, and the
positions to score with their weights. One jitted function scores them all; a mode is how rows are made.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from dualsm.data.tokenizer import SpecialIds, Tokenizer
from dualsm.errors import UserError
from dualsm.model.loss import cross_entropy
from dualsm.model.transformer import bind
from dualsm.progress import bar
from dualsm.sharding import batch_devices, place_rows

MODES = ("causal", "prefix", "masked", "monte_carlo")
_SHORTEST = 16  # tokens of the shortest bucket
_BATCH_TOKENS = 8192  # tokens a device scores at once


class Item(NamedTuple):
    """What to score: the completion after the context, both as text."""

    context: str
    completion: str


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How to score.

    Attributes:
      mode: one of `MODES`. causal: sum of log p(w_i | c, w_<i). prefix: the same with the context seen
        bidirectionally. masked: pseudo-log-likelihood, each token from both sides with n masks from it on
        (arXiv 2512.14549, eq. 10), averaged over `masks`. monte_carlo: bound on the log-likelihood by
        masking l of the completion's tokens, l stratified over 1..length (LLaDA, arXiv 2502.09992).
      masks: the numbers n.
      samples: draws of monte_carlo for each item.
      longest: most tokens of a text; longer contexts lose their beginning.
      seed: of monte_carlo.
    """

    mode: str
    masks: tuple[int, ...] = (1,)
    samples: int = 128
    longest: int = 1024
    seed: int = 0

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"mode {self.mode!r} is none of {', '.join(MODES)}")
        if not self.masks or min(self.masks) < 1 or self.samples < 1:
            raise UserError(f"masks={self.masks} and samples={self.samples} must be at least 1")


class Scores(NamedTuple):
    """Results for N items, in order.

    Attributes:
      log_likelihood_N: nats; the mode's score of each completion.
      greedy_N: whether the completion is what the model finds likeliest, token by token (one forward;
        means something in the causal and prefix modes).
      tokens_N: tokens of each completion.
      cut: how many contexts lost their beginning.
    """

    log_likelihood_N: np.ndarray
    greedy_N: np.ndarray
    tokens_N: np.ndarray
    cut: int


class _Row(NamedTuple):
    """One forward: `tokens` are seen, `prefix_end` of them from everywhere before it, and `targets` are
    scored at `positions` (each predicts the token after it) with `weight` and added to item `item`."""

    item: int
    tokens: list[int]
    prefix_end: int
    positions: Sequence[int]
    targets: list[int]
    weight: float


def encode_pair(tokenizer: Tokenizer, item: Item) -> tuple[list[int], list[int]]:
    """Tokens of context and completion, such that together they are the tokens of the whole text.

    Blanks at the end of the context belong to the completion, as in EleutherAI's harness.

    Raises:
      UserError: when the completion is empty.
    """
    context, completion = item
    if not completion:
        raise UserError(f"an empty completion cannot be scored (after the context {context[-40:]!r})")
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, completion = context[:-blanks], context[-blanks:] + completion
    whole, first = tokenizer.encode([context + completion, context])
    if len(first) >= len(whole):  # the completion was merged into the context's last token
        first, rest = tokenizer.encode([context, completion])
        return first, rest
    return whole[: len(first)], whole[len(first) :]


class Scorer:
    """Scores items with a model's parameters."""

    def __init__(self, config: FrozenConfigDict, params: dict, tokenizer: Tokenizer, mesh: jax.sharding.Mesh):
        """
        Args:
          config: `config.model`, frozen.
          params: parameters.
          tokenizer: the model's.
          mesh: whose devices share the rows.
        """
        self._config, self._params, self._tokenizer, self._mesh = config, params, tokenizer, mesh

    def __call__(
        self, items: Sequence[Item], scoring: Scoring, label: str = "", quiet: bool = False
    ) -> Scores:
        """Scores items of text.

        Raises:
          UserError: for an empty completion, or one longer than `scoring.longest`.
        """
        pairs = [encode_pair(self._tokenizer, item) for item in items]
        return self.score_tokens(pairs, scoring, label, quiet)

    def score_tokens(
        self,
        pairs: Sequence[tuple[list[int], list[int]]],
        scoring: Scoring,
        label: str = "",
        quiet: bool = False,
    ) -> Scores:
        """Scores items of token ids (without `<s>`, which is put in front)."""
        special = self._tokenizer.special
        make = functools.partial(_ROWS[scoring.mode], scoring=scoring, mask=special.mask)
        rows, cut = [], 0
        for number, (context, completion) in enumerate(pairs):
            if 1 + len(completion) > scoring.longest:
                raise UserError(
                    f"a completion of {len(completion)} tokens is longer than the model's rows "
                    f"({scoring.longest} tokens)"
                )
            room = scoring.longest - 1 - len(completion)
            cut += len(context) > room
            context = [special.bos, *(context[-room:] if room else [])]
            rows += make(number, context, completion)

        total_N = np.zeros(len(pairs))
        greedy_N = np.ones(len(pairs), bool)
        unit = "item"
        with bar(total=len(pairs), desc=label or scoring.mode, unit=unit, disable=quiet) as progress:
            done = 0.0
            for batch in _batches(rows, self._batch_rows()):
                nll_B, greedy_B = self._score(batch, special)
                for row, nll, greedy in zip(batch, nll_B, greedy_B, strict=False):
                    total_N[row.item] -= row.weight * nll
                    greedy_N[row.item] &= bool(greedy)
                done += len(pairs) * len(batch) / len(rows)
                progress.update(round(done) - progress.n)
        tokens_N = np.array([len(completion) for _, completion in pairs])
        return Scores(total_N, greedy_N, tokens_N, cut)

    def _batch_rows(self) -> Callable[[int], int]:
        devices = batch_devices(self._mesh)
        return lambda length: devices * max(1, _BATCH_TOKENS // length)

    def _score(self, batch: list[_Row], special: SpecialIds) -> tuple[np.ndarray, np.ndarray]:
        """Sum of nll and whether all targets are the likeliest, for each row of a batch of one shape."""
        length = _bucket(max(len(row.tokens) for row in batch))
        scored = 1 if max(len(row.positions) for row in batch) == 1 else length
        size = self._batch_rows()(length)
        tokens_BxL = np.full((size, length), special.pad, np.int32)
        prefix_end_B, position_BxP, target_BxP, weight_BxP = (
            np.zeros(shape, np.int32) for shape in ((size,), *((size, scored),) * 3)
        )
        for b, row in enumerate(batch):
            tokens_BxL[b, : len(row.tokens)] = row.tokens
            prefix_end_B[b] = row.prefix_end
            for places, values in ((position_BxP, row.positions), (target_BxP, row.targets)):
                places[b, : len(values)] = values
            weight_BxP[b, : len(row.positions)] = 1
        arrays = (tokens_BxL, prefix_end_B, position_BxP, target_BxP, weight_BxP)
        with jax.set_mesh(self._mesh):
            placed = (place_rows(self._mesh, a) for a in arrays)
            return jax.device_get(_score_rows(self._config, self._params, *placed))


@functools.partial(jax.jit, static_argnames="config")
def _score_rows(config, params, tokens_BxL, prefix_end_B, position_BxP, target_BxP, weight_BxP):
    """Sum over the scored positions of a row of -log p(target), and whether all targets are likeliest."""
    model = bind(config, params)
    ends_L = jnp.arange(1, tokens_BxL.shape[1] + 1)
    key_end_BxL = jnp.maximum(ends_L, prefix_end_B[:, None])
    features_BxLxD = model.features(tokens_BxL, jnp.zeros_like(tokens_BxL), key_end_BxL)
    features_BxPxD = jnp.take_along_axis(features_BxLxD, position_BxP[..., None], axis=1)
    kernel, bias = model.head.output.kernel[...], model.head.output.bias[...]
    zeros_BxP = jnp.zeros(target_BxP.shape)
    _, nll_BxP = cross_entropy(features_BxPxD, kernel, bias, target_BxP, zeros_BxP, zeros_BxP, 64)
    best_BxP = jax.lax.map(
        lambda f_BxD: jnp.argmax(f_BxD @ kernel.astype(f_BxD.dtype) + bias.astype(f_BxD.dtype), -1),
        features_BxPxD.swapaxes(0, 1),
    ).T
    greedy_B = ((best_BxP == target_BxP) | (weight_BxP == 0)).all(1)
    return (nll_BxP * weight_BxP).sum(1), greedy_B


def _causal_rows(item, context, completion, *, scoring, mask) -> list[_Row]:
    positions = range(len(context) - 1, len(context) + len(completion) - 1)
    return [_Row(item, (context + completion)[:-1], 0, positions, completion, 1.0)]


def _prefix_rows(item, context, completion, *, scoring, mask) -> list[_Row]:
    (row,) = _causal_rows(item, context, completion, scoring=scoring, mask=mask)
    return [row._replace(prefix_end=len(context))]


def _masked_rows(item, context, completion, *, scoring, mask) -> list[_Row]:
    rows = []
    for n in scoring.masks:
        for i, target in enumerate(completion):
            hidden = [mask] * min(n, len(completion) - i)
            tokens = context + completion[:i] + hidden + completion[i + len(hidden) :]
            place = len(context) + i - 1
            rows.append(_Row(item, tokens, len(tokens), [place], [target], 1 / len(scoring.masks)))
    return rows


def _monte_carlo_rows(item, context, completion, *, scoring, mask) -> list[_Row]:
    rng = np.random.default_rng((scoring.seed, item))
    rows, size = [], len(completion)
    # l is stratified: equal parts of the samples go to equal parts of 1..size.
    uniform = (np.arange(scoring.samples) + rng.random(scoring.samples)) / scoring.samples
    for count in 1 + np.floor(uniform * size).astype(int):
        chosen = np.sort(rng.choice(size, count, replace=False))
        hidden = np.array(completion)
        hidden[chosen] = mask
        tokens = context + hidden.tolist()
        positions = (len(context) + chosen - 1).tolist()
        targets = [completion[i] for i in chosen]
        rows.append(_Row(item, tokens, len(tokens), positions, targets, size / count / scoring.samples))
    return rows


_ROWS = {
    "causal": _causal_rows,
    "prefix": _prefix_rows,
    "masked": _masked_rows,
    "monte_carlo": _monte_carlo_rows,
}


def _bucket(length: int) -> int:
    """The least power of two that holds `length` tokens."""
    return max(_SHORTEST, 1 << (length - 1).bit_length())


def _batches(rows: Iterable[_Row], size_of: Callable[[int], int]) -> Iterable[list[_Row]]:
    """Rows in batches of one bucket each, and of one kind: one position a row, or many."""
    buckets: dict[tuple[int, bool], list[_Row]] = {}
    for row in rows:
        buckets.setdefault((_bucket(len(row.tokens)), len(row.positions) == 1), []).append(row)
    for (length, _), members in sorted(buckets.items(), key=lambda bucket: bucket[0]):
        size = size_of(length)
        for start in range(0, len(members), size):
            yield members[start : start + size]
