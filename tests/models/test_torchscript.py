"""torch.jit.trace: a program that holds for other inputs than its example; torch.jit.script: one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cottention.layers import CosineAttention, SoftmaxAttention
from cottention.models import CottentionBertForMaskedLM, CottentionBertModel, CottentionGPTForCausalLM
from tests.models.helpers import bert_config, gpt_config, randomised, some_tokens

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:.*script:DeprecationWarning",
    "ignore:.*is_gradient_checkpointing:FutureWarning",  # transformers' own, of whoever lists a model's attributes
)

PARTS = {"short_conv": 4, "output_norm": True, "output_gate": "sigmoid", "decay": "data"}
WINDOW = {"layer_types": ["linear_attention", "sliding_attention"], "sliding_window": 5}
MODELS: list[tuple[Any, Any, dict[str, Any]]] = [
    (CottentionGPTForCausalLM, gpt_config, {}),
    (CottentionGPTForCausalLM, gpt_config, {"attention_type": "softmax", "n_positions": 256}),
    (CottentionGPTForCausalLM, gpt_config, PARTS),
    (CottentionGPTForCausalLM, gpt_config, {"divisor": "query", "erase": True, "decay": "learned"}),
    (CottentionGPTForCausalLM, gpt_config, WINDOW),
    (CottentionBertForMaskedLM, bert_config, {"max_position_embeddings": 256}),
    (CottentionBertForMaskedLM, bert_config, {"attention_type": "softmax", "max_position_embeddings": 256}),
    (CottentionBertForMaskedLM, bert_config, {**PARTS, "position_embedding_type": "rotary"}),
]


def masked(B: int, T: int, holes: bool) -> dict[str, Any]:
    mask = torch.ones(B, T, dtype=torch.long)
    if holes:
        mask[0, :2], mask[-1, -3:] = 0, 0
    return {"input_ids": some_tokens(B, T), "attention_mask": mask}


def placed(B: int, T: int, cut: int | None) -> dict[str, Any]:
    positions = torch.arange(T).repeat(B, 1)
    if cut is not None:
        positions[:, cut:] -= cut
    return {"input_ids": some_tokens(B, T), "position_ids": positions}


def packed(T: int, *ends: int) -> dict[str, Any]:
    return {"input_ids": some_tokens(1, T), "cu_seqlens": torch.tensor([0, *ends, T], dtype=torch.int32)}


# an example, and inputs that differ from it in every way that its program must not have kept
TRIED: dict[str, list[dict[str, Any]]] = {
    "tokens": [{"input_ids": some_tokens(B, T)} for B, T in ((1, 3), (2, 7), (3, 130))],
    "mask without holes": [masked(2, 9, False), masked(3, 12, True), masked(2, 130, False), masked(1, 33, True)],
    "mask with holes": [masked(2, 9, True), masked(3, 12, False), masked(2, 130, True)],
    "positions": [placed(2, 9, None), placed(2, 9, 4), placed(3, 12, 5)],
    "packed by positions": [placed(2, 9, 4), placed(2, 9, 6), placed(2, 12, None)],
    "packed": [packed(9, 4), packed(9, 5), packed(12, 5, 7), packed(12)],
}


FAST = ("mask without holes", "packed")


@pytest.mark.parametrize(
    "case", [each if each in FAST else pytest.param(each, marks=pytest.mark.slow) for each in TRIED]
)
@pytest.mark.parametrize(("kind", "make", "settings"), MODELS)
def test_a_traced_model_holds_for_other_inputs(kind: Any, make: Any, settings: dict[str, Any], case: str) -> None:
    model = randomised(kind(make(**settings)), dtype=torch.float32, std=0.1)
    model.config.return_dict = model.config.use_cache = False
    example, *others = TRIED[case]
    with torch.no_grad():
        traced: Any = torch.jit.trace(model, example_kwarg_inputs=example, check_trace=False, strict=False)
        for inputs in others:
            real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            torch.testing.assert_close(traced(**inputs)[0][real], model(**inputs)[0][real], rtol=1e-4, atol=1e-5)


def test_scripting_is_one_line_that_names_what_to_take() -> None:
    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = CosineAttention(32, 4, causal=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(x)[0]

    tried: dict[str, list[Any]] = {
        "CosineAttention": [CosineAttention(32, 4, causal=False), Holder()],
        "SoftmaxAttention": [SoftmaxAttention(32, 4, causal=True)],
        "CottentionGPTForCausalLM": [CottentionGPTForCausalLM(gpt_config())],
        "CottentionBertModel": [CottentionBertModel(bert_config("softmax"))],
    }
    for name, modules in tried.items():
        for module in modules:
            with pytest.raises(
                RuntimeError, match=f"^{name} has no form in torch.jit.script.* take torch.compile, torch.export or"
            ):
                torch.jit.script(module)
