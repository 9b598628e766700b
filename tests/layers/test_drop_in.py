"""The layers go where an nn.MultiheadAttention was, in a model that knows nothing of this package."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cottention import CosineAttention, SoftmaxAttention


class ForeignBlock(nn.Module):
    """Somebody's pre-norm block; `attn` is the hole."""

    def __init__(self, attn: nn.Module, width: int) -> None:
        super().__init__()
        self.attn = attn
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attn(self.norm1(x))
        x = x + attended
        return x + self.mlp(self.norm2(x))


class ForeignModel(nn.Module):
    def __init__(self, attns: list[nn.Module], width: int = 32, vocabulary: int = 17) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*[ForeignBlock(attn, width) for attn in attns])
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


@pytest.mark.parametrize("kind", [CosineAttention, SoftmaxAttention])
def test_a_foreign_model_learns_to_repeat_the_token_two_back(kind: Any) -> None:
    model = ForeignModel([kind(32, 4, causal=True, rotary_dim=8) for _ in range(2)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        tokens = torch.randint(17, (16, 24))
        logits = model(tokens)[:, 2:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, :-2].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Guessing costs log 17 = 2.83.
    assert losses[0] > 2.7
    assert losses[-1] < 2.5
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_it_accepts_the_shape_that_multihead_attention_takes() -> None:
    x = torch.randn(2, 6, 32)
    theirs, _ = nn.MultiheadAttention(32, 4, batch_first=True)(x, x, x)
    ours, _ = CosineAttention(32, 4, causal=False)(x)
    assert ours.shape == theirs.shape


@pytest.mark.parametrize("kind", [CosineAttention, SoftmaxAttention])
def test_a_call_in_the_manner_of_multihead_attention_says_what_to_give(kind: Any) -> None:
    attn, x = kind(32, 4, causal=False), torch.randn(2, 6, 32)
    with pytest.raises(TypeError, match=r"give attn\(x\), or attn\(x, key_value_states\).*; got 3 tensors"):
        attn(x, x, x)
    with pytest.raises(TypeError, match="give attention_mask=~key_padding_mask, 1 = real"):
        attn(x, key_padding_mask=torch.zeros(2, 6, dtype=torch.bool))


def test_it_survives_state_dict_and_deepcopy_of_its_owner() -> None:
    model = ForeignModel([CosineAttention(32, 4, causal=True)])
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict(), strict=True)
    tokens = torch.randint(17, (2, 5))
    assert torch.equal(twin(tokens), model(tokens))
    assert "blocks.0.attn.norm_const" in model.state_dict()
