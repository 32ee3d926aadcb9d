"""Configuration of a dualsm model for transformers."""

from transformers import PretrainedConfig


class DualSMConfig(PretrainedConfig):
    """Configuration of a dualsm model.

    Attributes:
      rotary_base: base of the rotary position embedding.
      rotary_scaling: factor, low_freq_factor, high_freq_factor and original_max_position_embeddings of the
        scaling of Llama 3.1; None: no scaling.
      no_rope_layer_interval: n: every n-th layer has no rotary position embedding; 0: all layers have it.
      rms_norm_eps: epsilon of the RMS norms.
      num_key_value_heads: heads of keys and values; None: as many as of queries.
      head_dim: size of a head; None: hidden_size / num_attention_heads.
      qkv_bias: True if queries, keys and values have a bias.
      qk_norm: RMS norm of queries and keys: "none", "head" or "projection".
      norm_placement: RMS norms of the inputs ("pre") or outputs ("post") of attention and MLP.
      head: "projected" for the paper's head; "plain" for an output matrix only.
      mask_token_id: id of the mask token; in the mode "masked" it replaces the tokens to predict.
      never_predicted_ids: ids whose logits are masked, such as that of the mask token.
      masked_lm_shifted: True if the logits at position i of `DualSMForMaskedLM` predict token i + 1.
      max_position_embeddings: sequence length of the training; longer inputs work but are untested.
    """

    model_type = "dualsm"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=None,
        head_dim=None,
        qkv_bias=False,
        qk_norm="none",
        norm_placement="pre",
        head="projected",
        rotary_base=160_000.0,
        rotary_scaling=None,
        no_rope_layer_interval=0,
        rms_norm_eps=1e-7,
        max_position_embeddings=2048,
        mask_token_id=4,
        never_predicted_ids=(),
        masked_lm_shifted=False,
        use_cache=True,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.norm_placement = norm_placement
        self.head = head
        self.rotary_base = rotary_base
        self.rotary_scaling = rotary_scaling
        self.no_rope_layer_interval = no_rope_layer_interval
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.mask_token_id = mask_token_id
        self.never_predicted_ids = list(never_predicted_ids)
        self.masked_lm_shifted = masked_lm_shifted
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
