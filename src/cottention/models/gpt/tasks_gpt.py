"""GPT with a fine-tuning head: one label, number or set of flags per text, read off its last token.

model = CottentionGPTForSequenceClassification.from_pretrained(pretrained_dir, num_labels=3)
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from cottention.models.gpt.configuration_gpt import CottentionGPTConfig
from cottention.models.gpt.modeling_gpt import CottentionGPTModel, CottentionGPTPreTrainedModel
from cottention.models.losses import classification_loss, loss_settings
from cottention.models.pretrained import wants_dict


class CottentionGPTForSequenceClassification(CottentionGPTPreTrainedModel):
    """GPT with a head on each text's last token.

    Args:
        config: settings; `num_labels` outputs.
    """

    accepts_loss_kwargs = True

    def __init__(self, config: CottentionGPTConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.transformer = CottentionGPTModel(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        **loss_kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """One row of logits per text (per packed text with `cu_seqlens`).

        Args:
            input_ids: see `CottentionGPTModel.forward`, as for all arguments not listed here.
            attention_mask: tells each row's last real token; None: by `pad_token_id`, else the last column.
            position_ids: see there.
            inputs_embeds: see there.
            labels: see `classification_loss`.
            output_attentions: see there.
            output_hidden_states: see there.
            return_dict: see there.
            cu_seqlens: see there.
            **loss_kwargs: `num_items_in_batch`, texts of the whole optimiser step.

        Returns:
            loss, logits, hidden_states, attentions.

        Raises:
            TypeError: an argument is not known.
        """
        settings = loss_settings(loss_kwargs, ("num_items_in_batch",), f"{type(self).__name__}.forward")
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cu_seqlens=cu_seqlens,
        )
        x = outputs.last_hidden_state
        logits = self.score(self._last_tokens(x, input_ids, attention_mask, cu_seqlens))
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config.problem_type, **settings)
        output = SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()

    def _last_tokens(
        self, x: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Float[Tensor, "N D"]:
        if cu_seqlens is not None:
            return x[0, cu_seqlens[1:].to(torch.int64) - 1]
        real = attention_mask
        if real is None and self.config.pad_token_id is not None and input_ids is not None:
            real = input_ids != self.config.pad_token_id
        if real is None:
            return x[:, -1]
        column = torch.arange(x.shape[1], device=x.device)
        last = (column * (real != 0)).argmax(dim=-1)
        return x[torch.arange(x.shape[0], device=x.device), last]
