"""Model FLOPs by formula.

Counts matrix products only, with two operations per multiply-add. Forward and backward pass together count
three times the forward pass. Recomputation is not counted.
"""

from __future__ import annotations

import ml_collections

from dualsm.model.head_shapes import head_dim, num_kv_heads


def matrix_parameters(config: ml_collections.ConfigDict) -> int:
    """Returns the number of parameters in matrices, without the embedding. `config` is `config.model`.

    A tied embedding counts once, as the output matrix.
    """
    heads = 2 * config.num_heads + 2 * num_kv_heads(config)  # of queries, output, keys and values
    block = config.d_model * head_dim(config) * heads + 3 * config.d_model * config.d_ff
    projection = config.d_model**2 if config.head == "projected" else 0
    return config.num_layers * block + projection + config.d_model * config.vocab_size


def train_flops(config: ml_collections.ConfigDict, seq_len: int, attended: float) -> float:
    """Returns the FLOPs of a train step per sequence.

    Args:
      config: `config.model`.
      seq_len: L.
      attended: fraction of the L x L attention scores that is needed, for one document per sequence: 1/2 for
        causal attention, 1 for bidirectional attention.
    """
    attention = 2 * 2 * config.num_layers * config.num_heads * head_dim(config) * seq_len * attended
    return 3 * seq_len * (2 * matrix_parameters(config) + attention)
