"""A dualsm model for transformers: one set of weights, used causally, with a prefix, or bidirectionally.

The logits at position i predict token i + 1 in every mode, masked tokens included: what belongs in the
place of a mask is read off one position before it.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_dualsm import DualSMConfig

MODES = ("causal", "prefix", "masked")


def visible_keys(
    mode: str, queries: int, keys: int, attention_mask: torch.Tensor | None, prefix_lengths, device
) -> torch.Tensor:
    """Which keys each query sees, bool of shape [batch or 1, 1, queries, keys].

    Args:
      mode: one of `MODES`.
      queries: number of queries, the last of the `keys` positions.
      keys: number of positions, those in the cache included.
      attention_mask: [batch, keys]; 0 marks padding.
      prefix_lengths: [batch] or None; tokens of each row that see all of one another in the mode "prefix",
        padding on the left not counted. None: all queries' positions.
      device: to put it on.
    """
    key = torch.arange(keys, device=device)
    query = key[keys - queries :, None]
    if mode == "causal" or (mode == "prefix" and prefix_lengths is None and queries < keys):
        seen = (key <= query)[None]
    elif mode == "masked" or prefix_lengths is None:
        seen = torch.ones(1, queries, keys, dtype=torch.bool, device=device)
    else:
        ends = torch.as_tensor(prefix_lengths, device=device).reshape(-1, 1, 1)
        if attention_mask is not None:
            ends = ends + (attention_mask != 0).int().argmax(1).reshape(-1, 1, 1)  # padding on the left
        seen = (key <= query)[None] | (key < ends)
    if attention_mask is not None:
        seen = seen & (attention_mask != 0)[:, None, :keys]
    return seen[:, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, rotate-half form; x is [batch, heads, length, head width]."""
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
        width = config.hidden_size
        self.layer, self.heads = layer, config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x, seen, cos, sin, cache):
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        # Rows of padding see nothing; a finite bias keeps them from becoming NaN.
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
        bias = bias.masked_fill(~seen, torch.finfo(q.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, width))


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
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, seen, cos, sin, cache):
        x = x + self.self_attn(self.input_layernorm(x), seen, cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: DualSMConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DualSMForCausalLM(GenerationMixin, PreTrainedModel):
    config_class = DualSMConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]

    def __init__(self, config: DualSMConfig):
        super().__init__(config)
        self.model = Decoder(config)
        self.head_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def _rotary(self, start: int, length: int, device):
        width = self.config.hidden_size // self.config.num_attention_heads
        powers = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        positions = torch.arange(start, start + length, dtype=torch.float32, device=device)
        angles = positions[:, None] * self.config.rotary_base**-powers
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        mode: str = "causal",
        prefix_lengths: torch.LongTensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        cache=None,
        **unused,
    ) -> CausalLMOutputWithPast:
        """Logits for the token after each position.

        Args:
          input_ids: [batch, length], only what is not in the cache yet.
          attention_mask: [batch, length with the cache]; 0 marks padding, on either side.
          past_key_values: cache of keys and values, empty or not; those of the inputs are added to it.
          labels: [batch, length]; the inputs without masks. Position i is scored on label i + 1 unless that
            is -100.
          use_cache: whether to return a cache; not in the mode "masked".
          mode: "causal"; "prefix", where the prompt sees all of itself; "masked", where all sees all.
          prefix_lengths: [batch], for the mode "prefix": length of each prompt. None: all of the input, or
            in generation what came first.
          logits_to_keep: compute only this many last logits; 0: all.
          return_dict: False returns a tuple.
          cache: what newer transformers call past_key_values, in `generate` too.
        """
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and mode != "masked"
        cache = past_key_values if cache is None else cache
        if mode == "masked":
            if cache is not None and cache.get_seq_length():
                raise ValueError("the mode 'masked' sees all of its input at once and has no use for a cache")
            cache = None
        elif cache is None and use_cache:  # an empty one is false, too
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0

        length = input_ids.shape[1]
        seen = visible_keys(mode, length, past + length, attention_mask, prefix_lengths, input_ids.device)
        cos, sin = self._rotary(past, length, input_ids.device)
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x, seen, cos, sin, cache)
        x = self.model.norm(x[:, -logits_to_keep:] if logits_to_keep else x)
        logits = self.lm_head(F.gelu(self.head_proj(x), approximate="tanh"))

        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        kept = cache if use_cache else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=kept)
        return output.to_tuple() if return_dict is False else output
