"""Configuration of a dualsm model for transformers."""

from transformers import PretrainedConfig


class DualSMConfig(PretrainedConfig):
    """Configuration of a dualsm model.

    Attributes:
      rotary_base: base of the rotary position embedding.
      rms_norm_eps: epsilon of the RMS norms.
      mask_token_id: id of the mask token; in the mode "masked" it replaces the tokens to predict.
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
        rotary_base=160_000.0,
        rms_norm_eps=1e-7,
        max_position_embeddings=2048,
        mask_token_id=4,
        use_cache=True,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.rotary_base = rotary_base
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.mask_token_id = mask_token_id
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
