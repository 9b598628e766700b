"""Settings of a GPT (GPT-J's layout) with cosine or softmax attention; stock names, plus what cosine attention needs.

config = CottentionGPTConfig(vocab_size=2048, n_embd=256, n_layer=4, n_head=4)
"""

from __future__ import annotations

from typing import Any, ClassVar

from cottention.errors import SettingsError
from cottention.models.configuration import (
    ACTIVATIONS,
    MOST_LAYERS,
    CottentionConfig,
    check_choice,
    check_divides,
    check_number,
    check_rotary,
    check_size,
    check_token_id,
)
from cottention.models.layer_types import GPT_LAYER_TYPES, SLIDING


class CottentionGPTConfig(CottentionConfig):
    """Settings of the GPT models.

    Args:
        vocab_size: number of tokens.
        n_positions: length of a training window. Softmax alone refuses longer texts; cosine and hybrids decode past it.
        n_embd: width of a token.
        n_layer: number of blocks.
        n_head: heads per block; divides n_embd.
        n_inner: width inside the feed-forward part; None: 4 * n_embd.
        rotary_dim: dims of each head that get the rotary embedding, even; None: the whole head.
        position_embedding_type: "rotary", or "none": a block knows the order by what it forgets and convolves alone.
        activation_function: of the feed-forward part.
        resid_pdrop: dropout after attention and after the feed-forward part.
        embd_pdrop: dropout after the embedding.
        attn_pdrop: dropout of attention weights; softmax layers only, as cosine attention has none.
        layer_norm_epsilon: epsilon of every LayerNorm.
        initializer_range: standard deviation of new weights.
        sliding_window: tokens that a layer of "sliding_attention" in `layer_types` sees, itself among them.
        use_cache: whether a forward in evaluation mode returns a cache.
        tie_word_embeddings: whether the head shares the embedding's matrix.

    Raises:
        SettingsError: a value makes no sense, alone or beside the others.
        TypeError: a value has the wrong type.
    """

    model_type: ClassVar[str] = "cottention-gpt"
    attribute_map: ClassVar[dict[str, str]] = {
        "max_position_embeddings": "n_positions",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner",
    }

    known_layer_types: ClassVar[tuple[str, ...]] = GPT_LAYER_TYPES
    later_options: ClassVar[tuple[str, ...]] = (
        *CottentionConfig.later_options,
        "sliding_window",
        "position_embedding_type",
    )

    vocab_size: int = 50400
    n_positions: int = 1024
    n_embd: int = 1024
    n_layer: int = 20
    n_head: int = 16
    n_inner: int | None = None
    rotary_dim: int | None = None
    position_embedding_type: str = "rotary"
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    sliding_window: int | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.sliding_window is not None:
            check_size("sliding_window", self.sliding_window, maximum=2**31)  # as n_positions: no table has such rows
        super().__post_init__(**kwargs)
        for name in ("vocab_size", "n_embd", "n_head"):
            check_size(name, getattr(self, name))
        check_size("n_positions", self.n_positions, maximum=2**31)  # costs nothing: no table has that many rows
        check_size("n_layer", self.n_layer, maximum=MOST_LAYERS)
        if self.sliding_window is not None and SLIDING not in self.layer_types:
            raise SettingsError(
                f"sliding_window needs {SLIDING!r} in layer_types; got {self.sliding_window} and layers without"
            )
        check_divides("n_head", self.n_head, "n_embd", self.n_embd)
        if self.n_inner is not None:
            check_size("n_inner", self.n_inner)
        check_rotary(self.rotary_dim, self.n_embd // self.n_head)
        check_choice("position_embedding_type", self.position_embedding_type, ("rotary", "none"))
        if self.rotary_dim is not None and self.position_embedding_type == "none":
            raise SettingsError(
                f"rotary_dim needs position_embedding_type='rotary'; got {self.rotary_dim!r} and 'none'"
            )
        check_choice("activation_function", self.activation_function, ACTIVATIONS)
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            check_number(name, getattr(self, name), minimum=0, maximum=1)
        check_number("layer_norm_epsilon", self.layer_norm_epsilon, minimum=0)
        check_number("initializer_range", self.initializer_range, minimum=0)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            check_token_id(name, getattr(self, name), self.vocab_size)

    @property
    def longest_text(self) -> int | None:
        """Tokens of the longest text that it reads: softmax alone is bound to its window; None: there is none."""
        return None if self.keeps_states else self.n_positions

    @property
    def turned_dims(self) -> int | None:
        """Dims of each head that get the rotary embedding; None: none."""
        if self.position_embedding_type == "none":
            return None
        return self.n_embd // self.n_head if self.rotary_dim is None else self.rotary_dim
