"""Infilling of single words: the masked mode predicts all tokens of a word from the text around it."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from dualsm.config import freeze
from dualsm.data.documents import Documents
from dualsm.data.tokenizer import SpecialIds
from dualsm.devices.sharding import batch_devices, shard_batch
from dualsm.evaluation.bootstrap import bootstrap_stderr
from dualsm.evaluation.held_out_words import HeldOutWord, draw_words
from dualsm.evaluation.scoring import scoring_batch_size
from dualsm.generation.sampling_params import mask_reserved_ids
from dualsm.model.transformer import bind
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import TrainedRun

_MAX_POSITIONS = 512  # per device and batch; their logits are in memory at the same time


@functools.partial(jax.jit, static_argnames=("config", "special"))
def fill_words(
    config: FrozenConfigDict,
    params: dict,
    tokens_BxL: jax.Array,
    length_B: jax.Array,
    position_BxM: jax.Array,
    *,
    special: SpecialIds,
) -> tuple[jax.Array, jax.Array]:
    """Predicts the masked tokens of texts, one per forward pass.

    Each pass selects the masked position whose most likely token has the highest probability, and then
    inserts the correct token. Greedy unmasking (`generation.diffusion`) visits the same positions until its
    first wrong token, so it generates the word if and only if all predictions are correct.

    Args:
      config: `config.model`, frozen.
      params: parameters.
      tokens_BxL: texts.
      length_B: number of tokens of each text.
      position_BxM: positions of the tokens to mask, at least 1; -1 where a text has fewer than M.
      special: the tokenizer's special ids.

    Returns:
      Log-likelihood of the masked tokens in nats, float32 [B], and True if every prediction was correct.
    """
    rows = jnp.arange(tokens_BxL.shape[0])
    start_BxL = jnp.zeros_like(tokens_BxL)

    def fill_one(_, state):
        model = bind(config, params)  # inside of the loop, because NNX checks the trace level
        is_masked_BxM, log_p_B, is_correct_B = state
        outside = tokens_BxL.shape[1]
        hidden_BxM = jnp.where(is_masked_BxM, position_BxM, outside)
        inputs_BxL = tokens_BxL.at[rows[:, None], hidden_BxM].set(special.mask, mode="drop")
        features_BxLxD = model.features(inputs_BxL, start_BxL, start_BxL + length_B[:, None])
        before_BxM = jnp.maximum(position_BxM - 1, 0)
        features_BxMxD = jnp.take_along_axis(features_BxLxD, before_BxM[..., None], axis=1)
        logits_BxMxV = mask_reserved_ids(model.output_logits(features_BxMxD), special, allow_eos=False)
        log_p_BxMxV = jax.nn.log_softmax(logits_BxMxV)
        chosen_B = jnp.where(is_masked_BxM, log_p_BxMxV.max(-1), -jnp.inf).argmax(1)
        has_mask_B = is_masked_BxM.any(1)
        target_B = tokens_BxL[rows, position_BxM[rows, chosen_B]]
        log_p_BxV = log_p_BxMxV[rows, chosen_B]
        return (
            is_masked_BxM.at[rows, chosen_B].set(False),
            log_p_B + jnp.where(has_mask_B, log_p_BxV[rows, target_B], 0.0),
            is_correct_B & ((log_p_BxV.argmax(-1) == target_B) | ~has_mask_B),
        )

    state = (position_BxM >= 0, jnp.zeros(len(rows)), jnp.ones(len(rows), bool))
    passes = (position_BxM >= 0).sum(1).max()
    _, log_p_B, is_correct_B = jax.lax.fori_loop(0, passes, fill_one, state)
    return log_p_B, is_correct_B


def evaluate_infilling(run: TrainedRun, sources: Sequence[Documents], count: int) -> dict:
    """Measures how many words of held-out text the masked mode fills in exactly.

    Args:
      run: the run.
      sources: the held-out split of each corpus.
      count: number of words.

    Returns:
      The entry `infilling` of the results file, see `docs/evaluation.md`.

    Raises:
      UserError: if a prediction is not finite.
    """
    start = time.perf_counter()
    words = draw_words(sources, run.tokenizer, run.config.seq_len, count)
    log_p_N, is_correct_N = predict_words(run, words)
    bytes_N = np.array([word.bytes for word in words], float)
    values_Nx4 = np.stack([is_correct_N, np.ones(len(words)), -log_p_N / math.log(2), bytes_N], axis=1)
    documents = np.unique([word.document for word in words], axis=0, return_inverse=True)[1].ravel()
    sums_Dx4 = np.stack([np.bincount(documents, values_N) for values_N in values_Nx4.T], axis=1)
    accuracy_stderr, bits_stderr = bootstrap_stderr(sums_Dx4, _accuracy, _bits_per_byte)
    total_1x4 = values_Nx4.sum(0, keepdims=True)
    return {
        "accuracy": float(_accuracy(total_1x4)[0]) if words else None,
        "stderr": accuracy_stderr,
        "bits_per_byte": float(_bits_per_byte(total_1x4)[0]) if words else None,
        "bits_per_byte_stderr": bits_stderr,
        "n": len(words),
        "documents": len(sums_Dx4),
        "tokens_per_word": float(np.mean([word.stop - word.start for word in words])) if words else None,
        "seconds": time.perf_counter() - start,
        "settings": {"words": count, "seq_len": run.config.seq_len},
    }


def _accuracy(sums_Rx4: np.ndarray) -> np.ndarray:
    return sums_Rx4[:, 0] / sums_Rx4[:, 1]


def _bits_per_byte(sums_Rx4: np.ndarray) -> np.ndarray:
    return sums_Rx4[:, 2] / sums_Rx4[:, 3]


def predict_words(run: TrainedRun, words: Sequence[HeldOutWord]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the log-likelihood of each word in nats, and True where all its tokens are predicted, [N] each.

    Raises:
      UserError: if a log-likelihood is not finite.
    """
    config, special = freeze(run.config.model), run.tokenizer.special
    log_p_N, is_correct_N = np.zeros(len(words)), np.zeros(len(words), bool)
    for index_B, (tokens_BxL, length_B, position_BxM) in _word_batches(run, words):
        with jax.set_mesh(run.mesh):
            sharded = (shard_batch(run.mesh, a) for a in (tokens_BxL, length_B, position_BxM))
            log_p_B, is_correct_B = jax.device_get(fill_words(config, run.params, *sharded, special=special))
        log_p_N[index_B], is_correct_N[index_B] = log_p_B[: len(index_B)], is_correct_B[: len(index_B)]
    if not np.isfinite(log_p_N).all():
        raise UserError(
            "a word's log-likelihood is not finite, because training diverged; use an earlier checkpoint"
        )
    return log_p_N, is_correct_N


def _word_batches(
    run: TrainedRun, words: Sequence[HeldOutWord]
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Yields the indices of the words of each batch, and the arrays for `fill_words`.

    Words of similar numbers of tokens share a batch. Batches take few shapes, because each is compiled.
    """
    seq_len, num_devices = run.config.seq_len, batch_devices(run.mesh)
    count_N = np.array([word.stop - word.start for word in words], int)
    masks_N = np.array([_padded_masks(count) for count in count_N], int)
    for masks in np.unique(masks_N).tolist():
        members = np.flatnonzero(masks_N == masks)
        members = members[np.argsort(count_N[members], kind="stable")]
        size = min(num_devices * max(1, _MAX_POSITIONS // masks), scoring_batch_size(run.mesh, seq_len))
        for first in range(0, len(members), size):
            index_B = members[first : first + size]
            tokens_BxL = np.full((size, seq_len), run.tokenizer.special.pad, np.int32)
            position_BxM, length_B = np.full((size, masks), -1, np.int32), np.ones(size, np.int32)
            for row, word in enumerate(words[i] for i in index_B):
                length_B[row] = len(word.tokens_L)
                tokens_BxL[row, : length_B[row]] = word.tokens_L
                position_BxM[row, : word.stop - word.start] = np.arange(word.start, word.stop)
            yield index_B, (tokens_BxL, length_B, position_BxM)


def _padded_masks(count: int) -> int:
    """Returns the smallest of 4, 16, 64, ... that is at least `count`."""
    masks = 4
    while masks < count:
        masks *= 4
    return masks
