"""Floating-point operations by formula.

Counted are matrix products, two operations a multiply-add; forward and backward together are three times
the forward. What remat computes anew is not counted: the number measures progress, not work.
"""

from __future__ import annotations

import ml_collections


def matrix_parameters(config: ml_collections.ConfigDict) -> int:
    """Weights that multiply every token: all but embedding and vectors. `config` is `config.model`."""
    block = 4 * config.d_model**2 + 3 * config.d_model * config.d_ff
    projection = config.d_model**2 if config.get("head", "projected") == "projected" else 0
    return config.num_layers * block + projection + config.d_model * config.vocab_size


def train_flops(config: ml_collections.ConfigDict, seq_len: int, attended: float) -> float:
    """Operations of one training row.

    Args:
      config: `config.model`.
      seq_len: L.
      attended: share of the L x L attention scores that is needed, with one document a row: 1/2 for
        causal rows, 1 for bidirectional ones.
    """
    attention = 2 * 2 * config.num_layers * config.d_model * seq_len * attended
    return 3 * seq_len * (2 * matrix_parameters(config) + attention)
