"""Attention layers to put into any model: projections, rotary embedding, and cosine attention or its softmax twin.

from cottention.layers import CosineAttention
"""

from cottention.layers.attention import CosineAttention
from cottention.layers.maps import PackedTexts, cosine_map, decayed_map, map_context, softmax_map
from cottention.layers.options import WithOptions
from cottention.layers.rotary import RotaryTable, apply_rotary, packed_positions, rotary_table
from cottention.layers.softmax import softmax_attention
from cottention.layers.softmax_layer import KeyValueState, SoftmaxAttention, WindowState
from cottention.layers.states import AttentionState

__all__ = [
    "AttentionState",
    "CosineAttention",
    "KeyValueState",
    "PackedTexts",
    "RotaryTable",
    "SoftmaxAttention",
    "WindowState",
    "WithOptions",
    "apply_rotary",
    "cosine_map",
    "decayed_map",
    "map_context",
    "packed_positions",
    "rotary_table",
    "softmax_attention",
    "softmax_map",
]
