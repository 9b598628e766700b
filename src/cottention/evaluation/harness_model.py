"""Our GPT as a model of EleutherAI's lm-evaluation-harness; the only module that needs `lm-eval` to be imported.

Every document that a GPT was trained on follows an end-of-text token, so every text of a task does here too: that is
what makes the harness's likelihoods those of `evaluate_perplexity`.

    lm = HarnessModel(model, tokenizer, max_length=1024, batch_size=8)
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HFLM: Any = HFLM  # whose decorator hides from a type checker what it is


class HarnessModel(_HFLM):
    """A causal model whose every text begins behind an end-of-text token.

    Args:
        model: where it is, in the type it has.
        tokenizer: its tokenizer, with an end-of-text token.
        max_length: tokens that the model reads at most, that one included; longer texts lose their beginning.
        batch_size: texts per forward pass.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int, batch_size: int
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            max_length=max_length,
            batch_size=batch_size,
            prefix_token_id=tokenizer.eos_token_id,
            add_bos_token=False,
            # It would take the scores of requests that hold the same tokens, split elsewhere, from one of them.
            logits_cache=False,
        )

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        return [self.prefix_token_id, *context_ids], continuation_ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Prompts to continue, padded on the left; one that is too long loses its beginning."""
        most = (left_truncate_len or self.max_length) - 1
        rows = [[self.prefix_token_id, *self.tok_encode(text)[-most:]] for text in strings]
        longest = max(map(len, rows))
        ids = [[self.prefix_token_id] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids), torch.tensor(mask)
