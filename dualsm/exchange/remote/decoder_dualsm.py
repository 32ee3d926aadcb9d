"""The layers of a dualsm model for transformers."""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_dualsm import DualSMConfig


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies rotary position embedding in the rotate-half form; x is [batch, heads, length, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: DualSMConfig, layer: int):
        super().__init__()
        width, self.head_dim, self.qk_norm = config.hidden_size, config.head_dim, config.qk_norm
        self.layer, self.group = layer, config.num_attention_heads // config.num_key_value_heads
        interval = config.no_rope_layer_interval
        self.is_rotated = not interval or (layer + 1) % interval != 0
        queries, keys = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(width, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, width, bias=False)
        if self.qk_norm != "none":
            sizes = (queries, keys) if self.qk_norm == "projection" else (self.head_dim, self.head_dim)
            self.q_norm, self.k_norm = (RMSNorm(size, config.rms_norm_eps) for size in sizes)

    def forward(self, x, seen, position, cos, sin, cache):
        batch, length, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.view(batch, length, -1, self.head_dim) for y in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if self.is_rotated:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            # Static caches of transformers before version 5 need the positions.
            k, v = cache.update(k, v, self.layer, {"cache_position": position})
        if self.group > 1:
            k, v = (y.repeat_interleave(self.group, dim=1) for y in (k, v))
        # Padding queries may have no visible key; a finite bias prevents NaN.
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
        bias = bias.masked_fill(~seen, torch.finfo(q.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, config: DualSMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: DualSMConfig, layer: int):
        super().__init__()
        self.norm_placement = config.norm_placement
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, seen, position, cos, sin, cache):
        if self.norm_placement == "post":
            x = x + self.input_layernorm(self.self_attn(x, seen, position, cos, sin, cache))
            return x + self.post_attention_layernorm(self.mlp(x))
        x = x + self.self_attn(self.input_layernorm(x), seen, position, cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: DualSMConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
