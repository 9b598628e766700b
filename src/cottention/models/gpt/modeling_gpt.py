"""GPT-J's architecture with cosine or softmax attention: x + attention(ln(x)) + mlp(ln(x)), with one shared LayerNorm.

Parameter names are GPT-J's plus `attn.norm_const`, so published and stock weights load by name. A cosine model decodes
from a `CosineCache` of constant size and past n_positions, and so does a hybrid (`layer_types`), whose softmax layers
keep their keys there; a softmax model keeps transformers' DynamicCache.

    model = CottentionGPTForCausalLM(CottentionGPTConfig(vocab_size=2048, n_embd=256, n_layer=4, n_head=4))
    loss = model(input_ids, labels=input_ids).loss
"""

from __future__ import annotations

from functools import wraps
from typing import Any, ClassVar, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from cottention.layers import RotaryTable, rotary_table
from cottention.models.arguments import DECODER_WORDS, known_arguments, zeros_and_ones
from cottention.models.cache import CosineCache
from cottention.models.fused_loss import head_cross_entropy
from cottention.models.gpt.caches_gpt import check_cache, what_caches
from cottention.models.gpt.configuration_gpt import CottentionGPTConfig
from cottention.models.gpt.layers_gpt import CottentionGPTBlock
from cottention.models.losses import causal_lm_loss, next_tokens
from cottention.models.packing import one_row, reads_packed_texts
from cottention.models.pretrained import (
    CottentionPreTrainedModel,
    attention_maps,
    check_inputs,
    check_length,
    default_positions,
    longest_text,
    wants_dict,
)
from cottention.models.versions import (
    CACHE_NAME,
    CACHE_NAMES,
    cache_of,
    check_chunked_continuation,
    either_name,
    with_one_name,
)

logger = logging.get_logger(__name__)


class _Stateful:
    """Whether decoding keeps a state, which cannot be rolled back as a cache of keys and values can.

    A model says what holds for its layers; its class, which serves all kinds, what holds for cosine, the default.
    """

    def __get__(self, model: Any, owner: type) -> bool:
        return model is None or model.config.keeps_states


class CottentionGPTPreTrainedModel(CottentionPreTrainedModel):
    """Base of the GPT models."""

    config: CottentionGPTConfig
    config_class = CottentionGPTConfig
    base_model_prefix = "transformer"
    _no_split_modules: ClassVar[list[str]] = ["CottentionGPTBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = list(CACHE_NAMES)
    _is_stateful: Any = _Stateful()
    gaps_begin_texts = True
    # Heads of the sibling tasks, and buffers that old GPT-J files carry.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"^lm_head\.",
        r"^score\.",
        r"^classifier\.",
        r"^qa_outputs\.",
        r"attn\.(masked_)?bias$",
        r"embed_positions$",
    ]


class CottentionGPTModel(CottentionGPTPreTrainedModel):
    """The blocks without a head.

    Args:
        config: settings.
    """

    def __init__(self, config: CottentionGPTConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([CottentionGPTBlock(config, i) for i in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.wte = value

    @reads_packed_texts
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B S"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | str | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        cache: Cache | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Run the blocks.

        Args:
            input_ids: tokens, or give `inputs_embeds`.
            attention_mask: 1 = real, `[B, T]` or, with a filled cache, `[B, past + T]`; padding anywhere.
            position_ids: None: 0 .. T-1, padding counted, going on where a cache stands, restarting per packed text.
            past_key_values: `CosineCache` (softmax: `DynamicCache`) of what came before; with `cu_seqlens` a
                `CosineCache` with a row for each packed text, of a model of cosine layers alone.
            inputs_embeds: embedded tokens.
            use_cache: whether to return a cache; None: the config's, but not in training or for packed texts.
            output_attentions: whether to return every block's map `[B, H, T, S]`, by which map @ v is its context; the
                config's when None. Quadratic; not with a filled CosineCache. "packed": of packed texts too, zero
                between texts.
            output_hidden_states: whether to return the embedding, every block's output but the last's, and the
                final LayerNorm's output.
            return_dict: whether to return an object rather than a tuple.
            cu_seqlens: boundaries of packed texts; needs B == 1. Or transformers' `cu_seq_lens_q`, `cu_seq_lens_k`,
                `seq_idx`, or position_ids that start again within a row: see `cottention.models.packing`.
            cache: another name for past_key_values, that of transformers 5.24.
            **others: words of the library that ask for nothing here, such as `num_items_in_batch`.

        Returns:
            last_hidden_state, past_key_values (cache from transformers 5.24 on), hidden_states, attentions.

        Raises:
            ValueError: arguments contradict each other.
            TypeError: an argument is not known.
            CottentionError: the text is too long for a softmax model.
        """
        known_arguments(others, ("num_items_in_batch",), f"{type(self).__name__}.forward", DECODER_WORDS)
        past = either_name(past_key_values, cache)
        if self._is_stateful:
            CosineCache.adopt(past, self.config.layer_types)
        check_cache(past, self.config)
        attention_mask = zeros_and_ones(attention_mask)
        past_length = 0 if past is None else past.get_seq_length()
        check_inputs(input_ids, inputs_embeds, attention_mask, cu_seqlens, past_length, packs_past=self._packs_past)
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        maps = attention_maps(self.config, output_attentions, cu_seqlens)
        if maps is not None and self._is_stateful and past_length:
            raise ValueError("output_attentions needs every key, of which a CosineCache keeps none; got a filled one")
        B, T = x.shape[:2]
        if not self._is_stateful:
            positions = None if self.process_group is None else position_ids
            longest = longest_text(cu_seqlens, positions, past_length + T)
            check_length(longest, self.config.n_positions, "n_positions")
        cache = self._cache(past, use_cache, cu_seqlens)
        attention_mask = self._mask_for_attention(attention_mask, T, past_length)
        if cu_seqlens is not None:
            x, position_ids = one_row(x), None if position_ids is None else one_row(position_ids.expand(B, T))
        rotary = self._rotary(x, position_ids, cache, cu_seqlens, past_length)

        x = self.drop(x)
        hidden_states: tuple[Tensor, ...] = ()
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        for block in self.h:
            if keep:
                hidden_states += (x,)
            x = block(x, attention_mask, cu_seqlens, rotary, cache, maps is not None, B)
            if maps is not None:
                x, weights = x
                maps.append(weights)
        x = self.ln_f(x)
        if isinstance(cache, CosineCache):
            if cu_seqlens is None:
                cache.advance_positions(T, position_ids, attention_mask, like=x)
            else:
                cache.advance_packed_positions(cu_seqlens, position_ids)
        if cu_seqlens is not None:
            x, *kept = (states.reshape(B, T, -1) for states in (x, *hidden_states))
            hidden_states = tuple(kept)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            **{CACHE_NAME: cache},
            hidden_states=(*hidden_states, x) if keep else None,
            attentions=None if maps is None else tuple(maps),
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()

    @property
    def _packs_past(self) -> bool:
        """Whether packed texts may go on from states: keys of many texts lie in no row of a pack."""
        return set(self.config.layer_types) == {"linear_attention"}

    def _cache(self, past: Cache | None, use_cache: bool | None, cu_seqlens: Tensor | None) -> Cache | None:
        """The cache to fill: a new one where it is wanted and none is given."""
        if self.process_group is not None:
            if use_cache or past is not None:
                raise ValueError("use_cache and past_key_values exclude a sequence that ranks share; got both")
            return None
        if cu_seqlens is not None and not self._packs_past:
            if use_cache or past is not None:
                raise ValueError("use_cache and past_key_values exclude cu_seqlens; got both")
            return None
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # The backward pass goes through the blocks again, which would fill a cache twice. Without it (`generate`
            # while training) nothing is recomputed.
            if past is not None and past.get_seq_length() > 0:
                raise ValueError("a filled past_key_values and gradient checkpointing exclude each other; got both")
            if use_cache or past is not None:
                logger.warning_once("use_cache is left out: it does not go with gradient checkpointing")
            return None
        if past is not None:
            return past
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seqlens is None
        if not use_cache:
            return None
        if self._is_stateful:
            return CosineCache(self.config.n_layer)
        return DynamicCache(config=self.config)

    def _mask_for_attention(self, attention_mask: Tensor | None, T: int, past_length: int) -> Tensor | None:
        """States need the new columns' mask, a cache of keys that of all cached ones."""
        if attention_mask is None or past_length == 0:
            return attention_mask
        if self._is_stateful:
            return attention_mask[:, attention_mask.shape[1] - T :]
        if attention_mask.shape[1] == T:
            raise ValueError(
                f"attention_mask must cover the {past_length} cached tokens too, {past_length + T} columns, for "
                f"attention_type='softmax'; got {T}"
            )
        return attention_mask

    def _rotary(
        self,
        x: Tensor,
        position_ids: Tensor | None,
        cache: Cache | None,
        cu_seqlens: Tensor | None,
        past_length: int,
    ) -> RotaryTable | None:
        if self.config.turned_dims is None:
            return None
        T = x.shape[1]
        if position_ids is None:
            if isinstance(cache, CosineCache):
                position_ids = cache.positions(T, x.device, cu_seqlens)
            else:
                position_ids = default_positions(T, cu_seqlens, x.device) + past_length
        return rotary_table(position_ids, self.config.turned_dims)


class CottentionGPTForCausalLM(CottentionGPTPreTrainedModel, GenerationMixin):
    """GPT with the next-token head.

    Args:
        config: settings.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}
    accepts_loss_kwargs = True
    fused_loss: bool = False
    """Compute the loss without the logits (`head_cross_entropy`), which then are None; for training."""

    def __init__(self, config: CottentionGPTConfig) -> None:
        super().__init__(config)
        self.transformer = CottentionGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    @reads_packed_texts
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B S"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | str | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **loss_kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and the loss when there are labels.

        Args:
            input_ids: see `CottentionGPTModel.forward`, as for all arguments not listed here.
            attention_mask: see there.
            position_ids: see there.
            past_key_values: see there.
            inputs_embeds: see there.
            labels: the tokens themselves, -100 where there is no target; shifted here.
            use_cache: see there; without a cache when there are labels, unless asked for.
            output_attentions: see there.
            output_hidden_states: see there.
            return_dict: see there.
            cu_seqlens: see there.
            logits_to_keep: number of last positions to compute logits for, or their indices; 0: all.
            cache: see there.
            **loss_kwargs: `num_items_in_batch`, targets of the whole optimiser step; `shift_labels`, targets already
                shifted, instead of labels.

        Returns:
            loss, logits (None with a loss under `fused_loss`), past_key_values (cache from transformers 5.24 on),
            hidden_states, attentions.

        Raises:
            TypeError: an argument is not known.
        """
        # In **kwargs because the Trainer takes every named argument with "label" in it for one that it must pass.
        known = ("num_items_in_batch", "shift_labels")
        settings = known_arguments(loss_kwargs, known, f"{type(self).__name__}.forward", DECODER_WORDS)
        has_labels = labels is not None or settings.get("shift_labels") is not None
        if self.process_group is not None and labels is not None and settings.get("shift_labels") is None:
            raise ValueError(
                "a slice needs shift_labels, for the target of its last token stands in the next slice: "
                "cottention.distributed.slice_batch gives them; got labels"
            )
        if use_cache is None and has_labels:
            use_cache = False
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=either_name(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cu_seq_lens_q=cu_seqlens,
        )
        x = outputs.last_hidden_state
        logits = loss = None
        if has_labels and self.fused_loss:
            targets = next_tokens(labels, settings.get("shift_labels"), cu_seqlens)
            loss = head_cross_entropy(self.lm_head, x, targets, settings.get("num_items_in_batch"))
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(x[:, kept] if not isinstance(logits_to_keep, int) or logits_to_keep else x)
            loss = causal_lm_loss(logits, labels, cu_seqlens=cu_seqlens, **settings) if has_labels else None
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: cache_of(outputs)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()

    @wraps(GenerationMixin.generate)  # pyright: ignore[reportAttributeAccessIssue]
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`; the cache may have either of its names."""
        kwargs = with_one_name(kwargs)
        if self._is_stateful:
            CosineCache.adopt(kwargs.get(CACHE_NAME), self.config.layer_types)
        return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse `generate_batch`, whose requests would fail one by one in a thread of their own.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "generate_batch needs a paged cache of keys and values, which our models have not: use generate"
        )

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """Start `generate` with an empty cache of our kind; transformers would make one of keys and values."""
        past = model_kwargs.get(CACHE_NAME)
        if past is not None and past.get_seq_length() > 0 and generation_config.prefill_chunk_size is not None:
            check_chunked_continuation()
        if self._is_stateful and generation_config.use_cache and past is None:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"cache_implementation must be left out or 'dynamic' for {what_caches(self.config)}; "
                    f"got {generation_config.cache_implementation!r}"
                )
            generation_config.cache_implementation = None  # of this call's own copy; the cache is there
            model_kwargs[CACHE_NAME] = CosineCache(self.config.n_layer)
        super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            generation_config, model_kwargs, *args
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of the next forward within `generate`.

        Raises:
            ValueError: a text is continued from a cache without saying where it stands.
        """
        past = either_name(past_key_values, cache)
        if next_sequence_length is not None and next_sequence_length < 1:
            assert past is not None
            raise ValueError(
                f"to continue from past_key_values, give input_ids of the whole text, or the new tokens and an "
                f"attention_mask over the whole text; the cache holds {past.get_seq_length()} tokens, "
                f"got {input_ids.shape[1]} and no longer mask"
            )
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            **{CACHE_NAME: past},
            **kwargs,
        )
        # What `generate` takes for stop_strings, it hands on to the model.
        inputs.pop("tokenizer", None)
        # The name that every version's clients look for here: PEFT 0.21 puts its prompts before each token without it.
        inputs["past_key_values"] = inputs.pop(CACHE_NAME, None)
        if isinstance(past, CosineCache) and past.next_position is not None:
            # The cache knows where its rows stand, filled by generate or by a plain forward (which counts padding).
            inputs.pop("position_ids", None)
        return inputs
