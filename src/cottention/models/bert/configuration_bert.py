"""Settings of a BERT with cosine or softmax attention; the stock names, plus what cosine attention needs.

config = CottentionBertConfig(vocab_size=2048, hidden_size=256, num_hidden_layers=4, num_attention_heads=4)
"""

from __future__ import annotations

from typing import Any, ClassVar

from cottention.errors import SettingsError
from cottention.models.configuration import (
    ACTIVATIONS,
    MOST_LAYERS,
    CottentionConfig,
    check_bool,
    check_choice,
    check_divides,
    check_number,
    check_rotary,
    check_size,
    check_token_id,
)

POSITION_TYPES = ("absolute", "rotary")


class CottentionBertConfig(CottentionConfig):
    """Settings of the BERT models; the defaults are those of the published model.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of a token.
        num_hidden_layers: number of layers.
        num_attention_heads: heads per layer; divides hidden_size.
        intermediate_size: width inside the feed-forward part.
        hidden_act: its activation.
        hidden_dropout_prob: dropout after embeddings and every sublayer.
        attention_probs_dropout_prob: dropout of attention weights; softmax only, as cosine attention has none.
        max_position_embeddings: longest text, in tokens; with rotary positions that of training, which no text is
            bound to.
        position_embedding_type: "absolute", learned positions added to the words; or "rotary", which turns queries and
            keys of every layer and has no longest text.
        rotary_dim: dims of each head that get the rotary embedding, even; None: the whole head.
        norm_first: whether LayerNorm stands before each sublayer, which then adds to a stream that a last LayerNorm
            normalises, rather than behind each sum.
        type_vocab_size: number of token types.
        initializer_range: standard deviation of new weights.
        layer_norm_eps: epsilon of every LayerNorm.
        pad_token_id: its embedding gets no lookup gradient.
        classifier_dropout: dropout before a task's head; None: hidden_dropout_prob.
        tie_word_embeddings: whether the decoder shares the word embeddings' matrix.
        sparse_prediction: in training with labels, score the words at labelled positions alone: the same loss for a
            seventh of the decoder's work. Logits are then `[targets, vocab_size]`.

    Raises:
        SettingsError: a value makes no sense, alone or beside the others.
        TypeError: a value has the wrong type.
    """

    model_type: ClassVar[str] = "cottention-bert"
    later_options: ClassVar[tuple[str, ...]] = (
        *CottentionConfig.later_options,
        "position_embedding_type",
        "rotary_dim",
        "norm_first",
    )

    vocab_size: int = 28996
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True
    sparse_prediction: bool = False
    position_embedding_type: str = "absolute"
    rotary_dim: int | None = None
    norm_first: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"):
            check_size(name, getattr(self, name))
        check_size("num_hidden_layers", self.num_hidden_layers, maximum=MOST_LAYERS)
        check_size("max_position_embeddings", self.max_position_embeddings)
        check_size("type_vocab_size", self.type_vocab_size)
        check_divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
        check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            check_number(name, getattr(self, name), minimum=0, maximum=1)
        if self.classifier_dropout is not None:
            check_number("classifier_dropout", self.classifier_dropout, minimum=0, maximum=1)
        check_number("initializer_range", self.initializer_range, minimum=0)
        check_number("layer_norm_eps", self.layer_norm_eps, minimum=0)
        for name in ("sparse_prediction", "norm_first"):
            check_bool(name, getattr(self, name))
        self._check_positions()
        if self.erase:
            raise SettingsError("erase must be False for a BERT: what erases what has no order otherwise; got True")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            check_token_id(name, getattr(self, name), self.vocab_size)

    @property
    def is_rotary(self) -> bool:
        """Whether positions turn queries and keys, instead of being learned."""
        return self.position_embedding_type == "rotary"

    @property
    def longest_text(self) -> int | None:
        """Tokens of the longest text that it has positions for; None: there is none."""
        return None if self.is_rotary else self.max_position_embeddings

    def _check_positions(self) -> None:
        check_choice("position_embedding_type", self.position_embedding_type, POSITION_TYPES)
        if self.is_rotary:
            check_rotary(self.rotary_dim, self.hidden_size // self.num_attention_heads)
        elif self.rotary_dim is not None:
            raise SettingsError(
                f"rotary_dim needs position_embedding_type='rotary'; "
                f"got {self.rotary_dim!r} and {self.position_embedding_type!r}"
            )

    def least_parameters(self) -> int:
        """Numbers that every model of these sizes has at the least."""
        tables = self.type_vocab_size + (0 if self.is_rotary else self.max_position_embeddings)
        return super().least_parameters() + tables * self.hidden_size
