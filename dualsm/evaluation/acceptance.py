"""Acceptance: the number of drafted tokens that speculative decoding accepts, on held-out text."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from dualsm.config import freeze
from dualsm.data.documents import Documents
from dualsm.data.tokenizer import SpecialIds
from dualsm.evaluation.segments import read_segments
from dualsm.generation import drafting, prompt_batches
from dualsm.generation.autoregressive import Cache, prefill
from dualsm.generation.sampling_params import SamplingParams
from dualsm.model.transformer import bind
from dualsm.rundir.trained_run import TrainedRun

SAMPLINGS = {"greedy": SamplingParams(temperature=0), "sampled": SamplingParams(temperature=1)}
_SEGMENTS = 128  # segments of documents, each up to a sequence long
_DRAFTS = 4  # per segment, each after a random number of its tokens
_MAX_POSITIONS = 512  # per batch, over all drafts; their distributions are in memory at the same time
_SEED = 20251214  # the same segments and positions for every checkpoint


@functools.partial(jax.jit, static_argnames=("config", "size", "special"))
def accepted_prefixes(
    config: FrozenConfigDict,
    params: dict,
    tokens_BxS: jax.Array,
    length_B: jax.Array,
    cache: Cache,
    key_B: jax.Array,
    *,
    size: int,
    special: SpecialIds,
) -> jax.Array:
    """Drafts after the first `length_B` tokens of each text, and computes acceptance probabilities.

    Args:
      config: `config.model`, frozen.
      params: parameters.
      tokens_BxS: texts.
      length_B: number of tokens before the draft, at least 1.
      cache: causal keys and values of the texts; those after `length_B` are not read.
      key_B: PRNG key of each draft.
      size: P, the number of tokens per draft.
      special: the tokenizer's special ids.

    Returns:
      Probability that the first 1, ..., P tokens are all accepted, for each of `SAMPLINGS`, [2, B, P]. The
      sum over positions is the expected number of accepted tokens of each sampled draft.
    """
    model = bind(config, params)
    rows, size_B = jnp.arange(len(length_B)), jnp.full_like(length_B, size)
    features_BxPxD, cache = drafting.draft_features(
        model, tokens_BxS[rows, length_B - 1], length_B, size_B, cache, size=size, mask=special.mask
    )
    key_BxP = drafting.position_keys(key_B, length_B[:, None] + jnp.arange(size), 0)
    found = []
    for sampling in SAMPLINGS.values():
        log_q_BxPxV = drafting.log_distributions(model, features_BxPxD, sampling, special)
        draft = drafting.draw_draft(log_q_BxPxV, size_B, key_BxP, sampling)
        log_p_BxP1xV, _ = drafting.verify(model, draft, length_B, cache, sampling, special)
        found.append(jnp.exp(jnp.cumsum(drafting.log_acceptance(draft, log_p_BxP1xV), axis=1)))
    return jnp.stack(found)


def evaluate_acceptance(run: TrainedRun, sources: Sequence[Documents], draft: int) -> dict:
    """Measures the expected number of accepted tokens per draft on held-out text.

    Segments are spread evenly over the documents. The standard error treats the drafts of a segment as one
    observation.

    Args:
      run: the run.
      sources: the held-out split of each corpus.
      draft: tokens per draft; the first of them is always accepted.

    Returns:
      The entry `acceptance` of the results file, see `docs/evaluation.md`.
    """
    start, special = time.perf_counter(), run.tokenizer.special
    rng = np.random.default_rng(_SEED)
    texts = [segment.tokens for segment in read_segments(sources, run.config.seq_len, _SEGMENTS)]
    config, parts = freeze(run.config.model), []
    rows = max(1, _MAX_POSITIONS // (draft + 1))
    for part in prompt_batches.batch_slices(len(texts), run.config.seq_len + draft, rows):
        tokens_BxL, length_B = prompt_batches.pad_batch(texts[part], special.pad)
        keys_B = prompt_batches.prompt_keys(_SEED, texts[part])
        state = prefill(
            config, run.params, tokens_BxL, length_B, keys_B,
            size=tokens_BxL.shape[1] + draft, bidirectional=False, special=special,
        )  # fmt: skip
        uniform_BxC = (np.arange(_DRAFTS) + rng.random((len(length_B), _DRAFTS))) / _DRAFTS
        before_BxC = 1 + np.floor(uniform_BxC * (length_B[:, None] - 1)).astype(np.int32)
        found = [
            accepted_prefixes(
                config,
                run.params,
                state.tokens_BxS,
                before_B,
                state.cache,
                keys_B,
                size=draft,
                special=special,
            )
            for before_B in before_BxC.T
        ]
        parts.append(np.mean(jax.device_get(found), axis=0))
    accepted_2xNxP = np.concatenate(parts, axis=1, dtype=np.float64)
    by_sampling = zip(SAMPLINGS, accepted_2xNxP, strict=True)
    return {
        "draft": draft,
        **{name: _summary(accepted_NxP) for name, accepted_NxP in by_sampling},
        "n": len(texts) * _DRAFTS,
        "seconds": time.perf_counter() - start,
        "settings": {"segments": len(texts), "drafts_per_segment": _DRAFTS, "seq_len": run.config.seq_len},
    }


def _summary(accepted_NxP: np.ndarray) -> dict:
    accepted_N = accepted_NxP.sum(1)
    stderr = float(accepted_N.std(ddof=1) / len(accepted_N) ** 0.5) if len(accepted_N) > 1 else None
    return {
        "accepted_per_draft": float(accepted_N.mean()),
        "stderr": stderr,
        "tokens_per_forward": float(accepted_N.mean() + 1) / 2,
        "by_position": accepted_NxP.mean(0).tolist(),
    }
