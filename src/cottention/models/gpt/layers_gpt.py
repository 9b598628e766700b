"""The blocks of a GPT: attention and feed-forward side by side behind one shared LayerNorm.

block = CottentionGPTBlock(config, layer_idx=0)
x = block(x, attention_mask, cu_seqlens, rotary, cache)
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from cottention.layers import CosineAttention, RotaryTable, SoftmaxAttention
from cottention.models.cache import CosineCache
from cottention.models.gpt.configuration_gpt import CottentionGPTConfig
from cottention.models.layer_types import SLIDING
from cottention.models.pretrained import activation


class CottentionGPTMLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: CottentionGPTConfig) -> None:
        super().__init__()
        inner = 4 * config.n_embd if config.n_inner is None else config.n_inner
        self.fc_in = nn.Linear(config.n_embd, inner)
        self.fc_out = nn.Linear(inner, config.n_embd)
        self.act = activation(config.activation_function)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Each token by itself."""
        return self.dropout(self.fc_out(self.act(self.fc_in(x))))


class CottentionGPTBlock(GradientCheckpointingLayer):
    """One block; attention and feed-forward read the same normalised tokens."""

    def __init__(self, config: CottentionGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = _attention(config, config.layer_types[layer_idx])
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.mlp = CottentionGPTMLP(config)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        attention_mask: Int[Tensor, "B S"] | None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None,
        rotary: RotaryTable | None,
        cache: Cache | None,
        output_attentions: bool = False,
        map_rows: int | None = None,
    ) -> Float[Tensor, "B T D"] | tuple[Float[Tensor, "B T D"], Float[Tensor, "B H T S"]]:
        """The block's tokens, and its attention map when asked for; `cache` takes up what later tokens need.

        `map_rows` are the rows that packed texts were laid end to end from.
        """
        normed = self.ln_1(x)
        # A list of this pass's own: under checkpointing another pass computes the map again.
        maps: list[Tensor] | None = [] if output_attentions else None
        attended = self._attend(normed, attention_mask, cu_seqlens, rotary, cache, maps, map_rows)
        x = self.dropout(attended) + self.mlp(normed) + x
        return (x, maps[0]) if maps else x

    def _attend(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        rotary: RotaryTable | None,
        cache: Cache | None,
        maps: list[Tensor] | None,
        map_rows: int | None,
    ) -> Tensor:
        attn = self.attn
        if cache is None:
            told = {"attention_mask": attention_mask, "cu_seqlens": cu_seqlens, "rotary": rotary}
            return attn(x, **told, maps=maps, map_rows=map_rows)[0]
        if isinstance(cache, CosineCache):
            layer = cache.layers[self.layer_idx]
            o, state = attn(
                x,
                attention_mask=attention_mask,
                cu_seqlens=cu_seqlens,
                rotary=rotary,
                initial_state=layer.state,
                output_final_state=True,
                maps=maps,
                map_rows=map_rows,
            )
            layer.advance(state, x.shape[1])
            return o

        def extend(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)  # [B, H, S, K]
            return k.transpose(1, 2), v.transpose(1, 2)

        return attn(x, attention_mask=attention_mask, rotary=rotary, extend=extend, maps=maps)[0]


def _attention(config: CottentionGPTConfig, layer_type: str) -> CosineAttention | SoftmaxAttention:
    sizes: dict[str, Any] = {
        "causal": True,
        "bias": False,
        "rotary_dim": config.turned_dims,
        **config.attention_options,
    }
    if layer_type == "linear_attention":
        sizes |= config.memory_options
        attn = CosineAttention(config.n_embd, config.n_head, norm_const_init=config.norm_const_init, **sizes)
    else:
        window = config.sliding_window if layer_type == SLIDING else None
        attn = SoftmaxAttention(config.n_embd, config.n_head, dropout=config.attn_pdrop, sliding_window=window, **sizes)
    for projection in (attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj):
        projection.keeps_default_init = config.original_init  # type: ignore[assignment]
    return attn
