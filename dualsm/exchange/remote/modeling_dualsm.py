"""A dualsm model for transformers: the same weights in the modes "causal", "prefix" and "masked".

In every mode the logits at position i predict token i + 1. The prediction for a masked token is therefore at
the position before it.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_dualsm import DualSMConfig
from .decoder_dualsm import Decoder

MODES = ("causal", "prefix", "masked")


def visible_keys(
    position: torch.Tensor, keys: int, prefix_ends, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Returns the attention mask, bool of shape [batch or 1, 1, queries, keys]; True for visible keys.

    Args:
      position: [queries]; position of each query.
      keys: number of keys; the first key is at position 0.
      prefix_ends: [batch, 1, 1] or a number; keys at earlier positions are visible to all queries.
      attention_mask: [batch, length]; 0 marks padding.
    """
    key = torch.arange(keys, device=position.device)
    seen = (key <= position[:, None])[None] | (key < prefix_ends)
    if attention_mask is not None:
        mask = (attention_mask != 0)[:, None, :keys]
        seen = seen & F.pad(mask, (0, keys - mask.shape[-1]), value=False)
    return seen[:, None]


def first_token(attention_mask: torch.Tensor) -> torch.Tensor:
    """Returns the position of the first token that is not padding, [batch]."""
    return (attention_mask != 0).int().argmax(1)


class DualSMForCausalLM(GenerationMixin, PreTrainedModel):
    config_class = DualSMConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # if config.tie_word_embeddings
    accepts_loss_kwargs = True  # Trainer passes `num_items_in_batch`: accumulation does not change the loss

    def __init__(self, config: DualSMConfig):
        super().__init__(config)
        self.model = Decoder(config)
        self.is_projected = config.head == "projected"
        if self.is_projected:
            self.head_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=self.is_projected)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **_):
        """Returns the 2D mask unchanged; `generate` would expand it for static caches."""
        return attention_mask

    def generate(self, inputs=None, *args, **kwargs):
        """Generates as `GenerationMixin.generate` does, in the mode "causal" or "prefix" (see `forward`)."""
        mode = kwargs.get("mode", "causal")
        if mode not in ("causal", "prefix"):
            raise ValueError(f"generate: mode {mode!r} is not supported; use 'causal' or 'prefix'")
        if mode == "prefix" and kwargs.get("prefix_lengths") is None:
            # Set before the first step, because without a cache the inputs later contain generated tokens.
            ids, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
            if ids is None:
                raise ValueError("generate: mode 'prefix' needs a prompt; pass input_ids")
            if mask is None:
                pad = kwargs.get("pad_token_id", self.generation_config.pad_token_id)
                mask = kwargs["attention_mask"] = torch.ones_like(ids) if pad is None else (ids != pad).long()
            kwargs["prefix_lengths"] = ids.shape[1] - first_token(mask)
        return super().generate(inputs, *args, **kwargs)

    def _prefix_ends(self, mode, past, length, attention_mask, prefix_lengths, device):
        """Returns the end of the positions that are visible to all queries, as a number or [batch, 1, 1]."""
        if mode == "causal":
            return 0
        if mode == "masked" or prefix_lengths is None:
            return length * (past == 0)
        ends = torch.as_tensor(prefix_lengths, device=device).reshape(-1)
        if attention_mask is not None:
            ends = ends + first_token(attention_mask)
        prefill = length > 1 or (isinstance(past, int) and past == 0)
        if prefill and not ((ends <= past) | ((ends <= length) & (past == 0))).all():
            raise ValueError(
                f"mode 'prefix': the input ends at {int(past) + length} but the prompt has {int(ends.max())} "
                "tokens; pass the whole prompt in one call, without prefill_chunk_size"
            )
        return ends.reshape(-1, 1, 1)

    def _rotary(self, position: torch.Tensor):
        width = self.config.head_dim
        powers = torch.arange(0, width, 2, dtype=torch.float32, device=position.device) / width
        frequencies = self.config.rotary_base**-powers
        if scaling := self.config.rotary_scaling:
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            cycles = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
            kept = ((cycles - low) / (high - low)).clamp(0, 1)
            frequencies = frequencies * (kept + (1 - kept) / scaling["factor"])
        angles = position[:, None].float() * frequencies
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def mask_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns logits with those of `config.never_predicted_ids` masked."""
        if not self.config.never_predicted_ids:
            return logits
        ids = torch.tensor(self.config.never_predicted_ids, device=logits.device)
        return logits.index_fill(-1, ids, torch.finfo(logits.dtype).min)

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
        num_items_in_batch: torch.Tensor | int | None = None,
        position_ids: torch.LongTensor | None = None,
        **others,
    ) -> CausalLMOutputWithPast:
        """Computes the logits of the next token at each position.

        Args:
          input_ids: [batch, length]; token ids that are not in the cache yet.
          attention_mask: [batch, length including the cache]; 0 marks padding, which may be left or right.
          past_key_values: cache of keys and values; the keys and values of the inputs are appended.
          labels: [batch, length]; the unmasked inputs. The loss at position i is that of label i + 1, and
            positions whose label is -100 have no loss.
          use_cache: return a cache; ignored in the mode "masked".
          mode: "causal"; "prefix", with bidirectional attention within the prompt; "masked", with
            bidirectional attention.
          prefix_lengths: [batch]; length of each prompt in the mode "prefix". None: the whole input, or in
            generation the whole prompt.
          logits_to_keep: compute logits for this number of last positions only; 0: all.
          return_dict: False returns a tuple.
          cache: same as `past_key_values`; the name in newer versions of transformers.
          num_items_in_batch: number of labels in all accumulation steps of an update; Trainer passes it as
            the loss denominator. None: the loss is the mean over the labels of this input.
          position_ids: must increase by 1 per token. The values themselves have no effect, because rotary
            embeddings depend on distances only.
          others: must be None or False; `cache_position` is ignored.

        Raises:
          ValueError: if an argument is not supported.
        """
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} must be one of {', '.join(MODES)}")
        if wrong := [
            k for k, v in others.items() if k != "cache_position" and v is not None and v is not False
        ]:
            raise ValueError(f"{type(self).__name__} does not support {', '.join(wrong)}; leave it out")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} must have the shape [batch, length]"
            )
        if position_ids is not None and input_ids.shape[1] > 1:
            steps = position_ids.diff(dim=-1)
            if attention_mask is not None:
                seen = attention_mask[:, -input_ids.shape[1] :] != 0
                steps = steps * (seen[:, 1:] & seen[:, :-1])
            if (steps < 0).any():
                raise ValueError(
                    "position_ids decrease within a sequence; packed sequences are not supported"
                )
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and mode != "masked"
        cache = past_key_values if cache is None else cache
        if mode == "masked":
            if cache is not None and cache.get_seq_length():
                raise ValueError("mode 'masked' does not support a cache; pass the whole input in one call")
            cache = None
        elif cache is None and use_cache:  # not `not cache`: an empty cache is falsy
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0

        length, device = input_ids.shape[1], input_ids.device
        position = past + torch.arange(length, device=device)
        layers = getattr(cache, "layers", None)
        keys = getattr(layers[0], "max_cache_len", None) if layers else None  # of a static cache
        keys = past + length if keys is None else keys
        ends = self._prefix_ends(mode, past, length, attention_mask, prefix_lengths, device)
        seen = visible_keys(position, keys, ends, attention_mask)
        cos, sin = self._rotary(position)
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x, seen, position, cos, sin, cache)
        x = self.model.norm(x[:, -logits_to_keep:] if logits_to_keep else x)
        logits = self.lm_head(F.gelu(self.head_proj(x), approximate="tanh") if self.is_projected else x)
        logits = self.mask_logits(logits)

        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits, labels, size, num_items_in_batch=num_items_in_batch)
        kept = cache if use_cache else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=kept)
        return output.to_tuple() if return_dict is False else output
