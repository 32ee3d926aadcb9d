"""The transformer and train step in PyTorch, as the baseline of `train_step.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ml_collections import ConfigDict
from torch import nn
from torch.nn import functional


def rotate(x_BxHxLxK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x_BxHxLxK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Block(nn.Module):
    def __init__(self, config: ConfigDict):
        super().__init__()
        width, inner = config.d_model, config.d_ff
        self.heads = config.num_heads
        self.before_attention = nn.RMSNorm(width, eps=config.norm_eps)
        self.query, self.key, self.value, self.output = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.before_mlp = nn.RMSNorm(width, eps=config.norm_eps)
        self.up, self.gate = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x_BxLxD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, width = x_BxLxD.shape
        y = self.before_attention(x_BxLxD)
        q, k, v = (
            f(y).view(batch, length, self.heads, -1).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BxLxD = x_BxLxD + self.output(attended.transpose(1, 2).reshape(batch, length, width))
        y = self.before_mlp(x_BxLxD)
        return x_BxLxD + self.down(self.up(y) * functional.silu(self.gate(y)))


class Transformer(nn.Module):
    def __init__(self, config: ConfigDict, length: int):
        super().__init__()
        width = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.projection = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, config.vocab_size)
        head_dim = width // config.num_heads
        frequencies = config.rope_theta ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.arange(length)[:, None] * frequencies
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens_BxL: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens_BxL)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.output(functional.gelu(self.projection(self.norm(x)), approximate="tanh"))


def make_step(config: ConfigDict, compiled: bool) -> Callable[[torch.Tensor], float]:
    """Returns a function that runs one causal train step on tokens [B, L + 1] and returns the loss."""
    torch.manual_seed(config.seed)
    model = Transformer(config.model, config.seq_len)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.optimizer.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def loss_of(tokens_BxL1: torch.Tensor) -> torch.Tensor:
        logits_TxV = model(tokens_BxL1[:, :-1]).flatten(0, 1)
        return functional.cross_entropy(logits_TxV, tokens_BxL1[:, 1:].flatten())

    forward = torch.compile(loss_of) if compiled else loss_of

    def step(tokens_BxL1: torch.Tensor) -> float:
        loss = forward(tokens_BxL1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step
