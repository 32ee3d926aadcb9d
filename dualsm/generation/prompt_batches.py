"""Batches of prompts: PRNG keys, batch sizes, padding and sharding."""

from __future__ import annotations

import collections
import zlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dualsm.model.attention import QUERIES

MAX_BATCH_TOKENS = 16384  # per batch, including the tokens that are still to be generated
MAX_BATCH_SIZE = 256  # texts per batch, because the logits of each are in memory at the same time
_MULTIPLE = 32  # short batches are padded to a multiple of this length
_State = TypeVar("_State")


def prompt_keys(seed: int, prompts: Sequence[Sequence[int]]) -> jax.Array:
    """Returns the PRNG key of each prompt, [B].

    A key depends only on the seed, the prompt's tokens, and the number of equal prompts before it. The text
    generated from a prompt is therefore independent of the other prompts, and equal prompts get different
    texts.

    Args:
      seed: the seed.
      prompts: token ids.
    """
    seen: collections.Counter[bytes] = collections.Counter()
    data_Bx2 = np.zeros((len(prompts), 2), np.uint32)
    for row, prompt in enumerate(prompts):
        content = np.asarray(prompt, np.int32).tobytes()
        data_Bx2[row] = zlib.crc32(content), seen[content]
        seen[content] += 1
    key = jax.random.key(seed)
    return jax.vmap(lambda data: jax.random.fold_in(jax.random.fold_in(key, data[0]), data[1]))(data_Bx2)


def max_batch_size(max_length: int) -> int:
    """Returns the number of texts of up to `max_length` tokens to generate in one batch."""
    return max(1, min(MAX_BATCH_SIZE, MAX_BATCH_TOKENS // max_length))


def batch_slices(num_texts: int, max_length: int, max_size: int = MAX_BATCH_SIZE) -> Iterator[slice]:
    """Divides `num_texts` texts of up to `max_length` tokens into batches of at most `max_size`."""
    size = min(max_batch_size(max_length), max_size)
    return (slice(start, start + size) for start in range(0, num_texts, size))


def padded_length(length: int) -> int:
    """Returns the length that texts of up to `length` tokens are padded to.

    Padded lengths take few values, so that few shapes are compiled: multiples of 32 up to 2 * `QUERIES`, and
    multiples of `QUERIES` above, for which attention does not materialize an [L, L] array.
    """
    multiple = QUERIES if length > 2 * QUERIES else _MULTIPLE
    return -(-length // multiple) * multiple


def pad_batch(texts: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads texts on the right, to a length of `padded_length`.

    Args:
      texts: token ids.
      pad: id of `<pad>`.

    Returns:
      Token ids, int32 [B, L], and the length of each text, int32 [B].
    """
    length_B = np.array([len(text) for text in texts], np.int32)
    tokens_BxL = np.full((len(texts), padded_length(int(length_B.max()))), pad, np.int32)
    for row, text in zip(tokens_BxL, texts, strict=True):
        row[: len(text)] = text
    return tokens_BxL, length_B


def put_beside_params(params: dict, state: _State) -> _State:
    """Replicates the arrays of a state on the devices of the parameters.

    Compiled functions return states with this sharding. If the first state had another sharding, the second
    call would compile again.
    """
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.device_put(state, sharding)
