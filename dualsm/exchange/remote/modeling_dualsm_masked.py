"""A dualsm model as a masked language model of transformers: every position attends to all others."""

import torch
from transformers.modeling_outputs import MaskedLMOutput

from .modeling_dualsm import DualSMForCausalLM


class DualSMForMaskedLM(DualSMForCausalLM):
    """The weights of `DualSMForCausalLM` in the mode "masked".

    The logits at position i predict token i, as in other masked language models: the model predicts token i
    at position i - 1, and the shift happens here. With `config.masked_lm_shifted`, the logits at position i
    predict token i + 1, for programs that shift themselves (masked next-token prediction, MNTP).
    """

    def __init__(self, config):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # the loss of the shifted logits; transformers infers it from the name

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **others,
    ) -> MaskedLMOutput:
        """Computes the logits at each position, from tokens on both sides.

        Args:
          input_ids: [batch, length]; masked tokens are replaced by the mask token.
          attention_mask: [batch, length]; 0 marks padding.
          labels: [batch, length]; the original tokens at masked positions, -100 elsewhere. They are not
            shifted, with either value of `config.masked_lm_shifted`. The first token cannot be predicted.
          return_dict: False returns a tuple.
          logits_to_keep: return the logits of this many last positions only; 0: of all.
          num_items_in_batch: see `DualSMForCausalLM.forward`.
          others: see `DualSMForCausalLM.forward`.
        """
        output = super().forward(
            input_ids,
            attention_mask=attention_mask,
            labels=labels,
            use_cache=False,
            mode="masked",
            num_items_in_batch=num_items_in_batch,
            **others,
        )
        logits = output.logits
        if not self.config.masked_lm_shifted:
            # Nothing precedes the first token: all tokens that can be predicted are equally likely.
            first = self.mask_logits(torch.zeros_like(logits[:, :1]))
            logits = torch.cat([first, logits[:, :-1]], dim=1)
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        found = MaskedLMOutput(loss=output.loss, logits=logits)
        return found.to_tuple() if return_dict is False else found

    def generate(self, *args, **kwargs):
        """Refuses to generate; `AutoModelForCausalLM` loads the same folder for that."""
        raise ValueError("generate: load the folder with AutoModelForCausalLM")
