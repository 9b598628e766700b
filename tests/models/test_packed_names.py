"""Packed texts under all their names are kept apart: outputs, losses and gradients are those of separate texts."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments
from transformers.models.gptj import GPTJForCausalLM
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from cottention.models import (
    CosineCache,
    CottentionBertForMaskedLM,
    CottentionBertForMultipleChoice,
    CottentionBertForNextSentencePrediction,
    CottentionBertForPreTraining,
    CottentionBertForQuestionAnswering,
    CottentionBertForSequenceClassification,
    CottentionBertForTokenClassification,
    CottentionBertModel,
    CottentionGPTForCausalLM,
    CottentionGPTForQuestionAnswering,
    CottentionGPTForSequenceClassification,
    CottentionGPTForTokenClassification,
    CottentionGPTModel,
)
from cottention.models.packing import PACKING_NAMES
from cottention.models.versions import cache_of
from tests.models.helpers import (
    ATTENTION_TYPES,
    bert_config,
    checkpointed,
    gpt_config,
    gradients,
    randomised,
    some_tokens,
)
from tests.models.test_softmax_twins import gpt_twins

TOKENS = some_tokens(2, 12)
LENGTHS = ([4, 1, 7], [1, 1, 6, 4])  # the texts of each row
POSITIONS = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
SEQ_IDX = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS])
BOUNDS = torch.tensor([0, *LENGTHS[0], *LENGTHS[1]]).cumsum(0).to(torch.int32)
FIRST = BOUNDS[:4]  # those of the first row

GPTS: list[tuple[Any, Any]] = [
    (CottentionGPTModel, gpt_config),
    (CottentionGPTForCausalLM, gpt_config),
    (CottentionGPTForSequenceClassification, gpt_config),
    (CottentionGPTForTokenClassification, gpt_config),
    (CottentionGPTForQuestionAnswering, gpt_config),
]
BERTS: list[tuple[Any, Any]] = [
    (CottentionBertModel, bert_config),
    (CottentionBertForPreTraining, bert_config),
    (CottentionBertForMaskedLM, bert_config),
    (CottentionBertForSequenceClassification, bert_config),
    (CottentionBertForTokenClassification, bert_config),
    (CottentionBertForQuestionAnswering, bert_config),
    (CottentionBertForNextSentencePrediction, bert_config),
]


def ways(rows: int) -> dict[str, dict[str, Any]]:
    """The same texts told in every way, in one row or two."""
    bounds = FIRST if rows == 1 else BOUNDS
    flash = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}
    told: dict[str, dict[str, Any]] = {
        "flash": flash,
        "flash, positions": {**flash, "position_ids": POSITIONS[:rows]},
        "int64, queries alone": {"cu_seq_lens_q": bounds.long()},
        "seq_idx": {"seq_idx": SEQ_IDX[:rows].to(torch.int32)},
        "positions": {"position_ids": POSITIONS[:rows]},
        "positions, full mask": {"position_ids": POSITIONS[:rows], "attention_mask": torch.ones(rows, 12).long()},
        "everything": {**flash, "seq_idx": SEQ_IDX[:rows], "position_ids": POSITIONS[:rows]},
    }
    if rows == 1:
        told["cu_seqlens"] = {"cu_seqlens": bounds}
    return told


def alone(model: Any, tokens: Tensor, **settings: Any) -> list[Any]:
    """Each text by itself."""
    return [
        model(text, **settings)
        for row, lengths in zip(tokens, LENGTHS, strict=False)
        for text in row[None].split(lengths, dim=1)
    ]


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(("kind", "make"), GPTS + BERTS)
def test_texts_told_in_any_way_are_kept_apart(kind: Any, make: Any, attention_type: str) -> None:
    model = randomised(kind(make(attention_type, num_labels=3)))
    for rows in (1, 2):
        tokens = TOKENS[:rows]
        separate = alone(model, tokens)
        for way, told in ways(rows).items():
            out = model(tokens, output_hidden_states=True, **told)
            for name, value in out.items():
                parts = [one[name] for one in separate if name in one] if name != "hidden_states" else []
                if not parts:
                    continue
                # A row per text, or a row per token.
                expected = torch.cat(parts) if parts[0].dim() == 2 and value.dim() == 2 and len(value) > rows else None
                if expected is None:
                    expected = torch.cat(parts, dim=1).reshape(value.shape)
                torch.testing.assert_close(value, expected, msg=lambda m, way=way, name=name: f"{way} {name}: {m}")
            assert [tuple(x.shape) for x in out.hidden_states] == [(rows, 12, 32)] * 3
            embedded = model(inputs_embeds=model.get_input_embeddings()(tokens), **told)
            torch.testing.assert_close(embedded[0], out[0])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_loss_does_not_cross_texts(attention_type: str, checkpointing: bool) -> None:
    """With and without -100 at the texts' first tokens, as separate texts and as stock GPT-J count it."""
    ours, stock = gpt_twins(CottentionGPTForCausalLM, GPTJForCausalLM)
    model = ours if attention_type == "softmax" else randomised(CottentionGPTForCausalLM(gpt_config(attention_type)))
    model.train()
    if checkpointing:
        checkpointed(model)
    num_targets = 24 - 7
    loss: Any = sum(
        model(text, labels=text, num_items_in_batch=num_targets).loss
        for row, lengths in zip(TOKENS, LENGTHS, strict=True)
        for text in row[None].split(lengths, dim=1)
    )
    loss.backward()
    expected = gradients(model)
    labels = TOKENS.masked_fill(POSITIONS == 0, -100)
    for told in ways(2).values():
        for targets in (TOKENS, labels):
            model.zero_grad()
            out = model(TOKENS, labels=targets, **told)
            out.loss.backward()
            torch.testing.assert_close(out.loss, loss)
            for name, got in gradients(model).items():
                torch.testing.assert_close(got, expected[name], rtol=1e-4, atol=1e-6)
    if attention_type == "softmax":
        theirs = stock(TOKENS, labels=labels, position_ids=POSITIONS, use_cache=False)
        torch.testing.assert_close(theirs.loss, loss, rtol=1e-4, atol=1e-5)


def test_stock_models_keep_such_texts_apart_too() -> None:
    """The control: what comes after a restart equals the text alone, in stock GPT-J, stock Llama and ours."""
    ours, gptj = gpt_twins(CottentionGPTForCausalLM, GPTJForCausalLM)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, **sizes)).eval()
    cosine = randomised(CottentionGPTForCausalLM(gpt_config()))
    for model in (gptj, llama, ours, cosine):
        packed = model(TOKENS, position_ids=POSITIONS, use_cache=False).logits
        single = torch.cat([out.logits[0] for out in alone(model, TOKENS, use_cache=False)])
        torch.testing.assert_close(packed.flatten(0, 1), single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("positions", "padded"),
    [
        ([3, 4, 5, 6, 7, 8], False),  # an offset
        ([0, 1, 2, 5, 6, 9], False),  # gaps
        ([2, 3, 4, 2, 3, 2], False),  # texts from 2 on, as RoBERTa counts
        ([1, 1, 1, 0, 1, 2], False),  # a left-padded row whose mask was lost
        ([1, 1, 1, 0, 1, 2], True),
        ([0, 0, 0, 0, 1, 2], True),
        ([0, 1, 2, 3, 3, 3], True),  # clipped
    ],
)
def test_positions_mean_what_they_mean_to_stock_gptj(positions: list[int], padded: bool) -> None:
    ours, stock = gpt_twins(CottentionGPTForCausalLM, GPTJForCausalLM)
    tokens, ids = TOKENS[:, :6], torch.tensor([positions])
    mask = torch.ones(2, 6, dtype=torch.int64)
    if positions[0] == positions[1]:
        mask[:, :3] = 0
    settings: dict[str, Any] = {"attention_mask": mask} if padded else {}
    got = ours(tokens, position_ids=ids, use_cache=False, **settings).logits
    expected = stock(tokens, position_ids=ids.expand(2, -1), use_cache=False, **settings).logits
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=2e-5)
    if not padded and min(positions) == positions[0] and positions.count(positions[0]) == 1:
        # With a cache stock models take gaps for one text, and so do ours.
        got, expected = (m(tokens, position_ids=ids.expand(2, -1)).logits for m in (ours, stock))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def test_bert_reads_gaps_as_stock_bert_does() -> None:
    model = randomised(CottentionBertModel(bert_config()))
    whole = model(TOKENS, position_ids=torch.arange(12)[None] * 2).last_hidden_state
    assert model(TOKENS, position_ids=torch.arange(12)[None] * 2).pooler_output.shape == (2, 32)
    other = TOKENS.clone()
    other[:, -1] = 1 + other[:, -1] % 60
    changed = model(other, position_ids=torch.arange(12)[None] * 2).last_hidden_state
    assert not torch.allclose(whole[:, 0], changed[:, 0]), "one text, all of whose tokens see the last one"


def test_decode_steps_and_filled_caches_are_no_packed_texts() -> None:
    for attention_type in ATTENTION_TYPES:
        model = randomised(CottentionGPTForCausalLM(gpt_config(attention_type)))
        whole = model(TOKENS).logits
        cache = cache_of(model(TOKENS[:, :5], position_ids=torch.arange(5)[None]))
        parts = [
            model(TOKENS[:, a:b], position_ids=torch.arange(a, b)[None], past_key_values=cache).logits
            for a, b in ((5, 6), (6, 11), (11, 12))
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole[:, 5:])
        with pytest.raises(ValueError, match=r"^position_ids that start again within a row need cu_seqlens beside a f"):
            model(TOKENS[:, :4], position_ids=torch.tensor([[12, 13, 0, 1]]), past_key_values=cache)


def test_packed_states_are_kept_and_carried_under_the_standard_names() -> None:
    model = randomised(CottentionGPTForCausalLM(gpt_config()))
    cache: Any = cache_of(model(TOKENS, position_ids=POSITIONS, use_cache=True))
    assert isinstance(cache, CosineCache)
    assert cache.next_position is not None
    assert cache.next_position.tolist() == [4, 1, 7, 1, 1, 6, 4]
    more = some_tokens(1, 7, seed=3)
    step = torch.arange(8, dtype=torch.int32)
    got = model(more, cu_seq_lens_q=step, cu_seq_lens_k=step, past_key_values=cache).logits[0]
    texts = [text for row, lengths in zip(TOKENS, LENGTHS, strict=True) for text in row.split(lengths)]
    for text, token, logits in zip(texts, more[0], got, strict=True):
        torch.testing.assert_close(logits, model(torch.cat([text, token[None]])[None]).logits[0, -1])


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(("kind", "make"), GPTS + BERTS)
def test_what_cannot_be_read_is_one_clear_line(kind: Any, make: Any, attention_type: str) -> None:
    model = kind(make(attention_type)).eval()
    padded = torch.ones_like(TOKENS)
    padded[:, -2:] = 0
    ones, other = torch.ones_like(TOKENS), torch.tensor([0, 5, 12], dtype=torch.int32)
    refused: list[tuple[type[Exception], str, int, dict[str, Any]]] = [
        (ValueError, "cu_seq_lens_k must tell the same texts as cu_seq_lens_q", 1, {"cu_seq_lens_k": other}),
        (ValueError, "seq_idx must tell the same texts as cu_seq_lens_q", 1, {"seq_idx": SEQ_IDX[1:]}),
        (ValueError, "max_length_k must be at least the longest text's tokens; got 6", 1, {"max_length_k": 6}),
        (ValueError, "position_ids must not start again within a text", 1, {"position_ids": POSITIONS[1:]}),
        (ValueError, "attention_mask and cu_seqlens exclude each other", 1, {"attention_mask": ones[:1]}),
        (ValueError, "cu_seqlens needs a batch of one packed row, B=1; got B=2", 2, {"cu_seqlens": FIRST}),
        (ValueError, "cu_seq_lens_q must run from 0 to the number of tokens, 24", 2, {}),
    ]
    for kind_of_error, message, rows, told in refused:
        with pytest.raises(kind_of_error, match=f"^{message}"):
            model(TOKENS[:rows], **{"cu_seq_lens_q": FIRST, **told})
    without: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "max_length_q needs cu_seq_lens_q", {"max_length_q": 7}),
        (ValueError, r"seq_idx must have shape \[B, T\] = \[2, 12\]; got \[1, 12\]", {"seq_idx": SEQ_IDX[:1]}),
        (ValueError, "seq_idx must be at least 0", {"seq_idx": SEQ_IDX - 1}),
        (TypeError, "seq_idx must be a tensor; got list", {"seq_idx": [0]}),
        (TypeError, "cu_seq_lens_q must be int32 or int64; got float32", {"cu_seq_lens_q": BOUNDS.float()}),
        (TypeError, "cu_seq_lens_q must be a tensor; got list", {"cu_seq_lens_q": [0, 24]}),
        (ValueError, "cu_seq_lens_k must run from 0", {"cu_seq_lens_k": BOUNDS[1:]}),
        (ValueError, "cu_seq_lens_k must run from 0", {"cu_seq_lens_k": torch.tensor([0, 9, 4, 24])}),
        (
            ValueError,
            r"position_ids must have shape \[B, T\] = \[2, 12\]",
            {"position_ids": POSITIONS.expand(3, 2, 12)},
        ),
        (ValueError, "position_ids must have shape", {"position_ids": torch.arange(12)}),
        (
            ValueError,
            "position_ids must not start again within a row beside an attention_mask with padding",
            {"position_ids": POSITIONS, "attention_mask": padded},
        ),
    ]
    for kind_of_error, message, told in without:
        with pytest.raises(kind_of_error, match=f"^{message}"):
            model(TOKENS, **told)
    with pytest.raises(ValueError, match=r"^output_attentions and cu_seqlens exclude each other"):
        model(TOKENS, position_ids=POSITIONS, output_attentions=True)
    with pytest.raises(TypeError):
        model(TOKENS, input_ids=TOKENS)
    assert set(PACKING_NAMES) <= set(inspect.signature(model.forward).parameters)


def test_rows_per_text_need_a_token_each_and_answers_need_a_row_each() -> None:
    empty = torch.tensor([0, 0, 12], dtype=torch.int32)
    models: dict[str, Any] = {
        "last": CottentionGPTForSequenceClassification(gpt_config()),
        "first": CottentionBertForSequenceClassification(bert_config()),
    }
    for which, model in models.items():
        with pytest.raises(ValueError, match=f"^every packed text must hold a token, whose {which} token is read"):
            model(TOKENS[:1], cu_seq_lens_q=empty)
    at = torch.tensor([1, 2])
    answers: list[Any] = [
        CottentionBertForQuestionAnswering(bert_config()),
        CottentionGPTForQuestionAnswering(gpt_config()),
    ]
    for model in answers:
        with pytest.raises(ValueError, match=r"^start_positions and packed texts exclude each other"):
            model(TOKENS, position_ids=POSITIONS, start_positions=at, end_positions=at)
    with pytest.raises(ValueError, match=r"^position_ids must not start again within a choice"):
        CottentionBertForMultipleChoice(bert_config())(TOKENS[None], position_ids=POSITIONS[None])


def test_softmax_keeps_no_cache_of_texts_told_by_positions() -> None:
    model = CottentionGPTForCausalLM(gpt_config("softmax")).eval()
    for settings in ({"use_cache": True}, {"past_key_values": DynamicCache()}):
        with pytest.raises(ValueError, match=r"^use_cache and past_key_values exclude cu_seqlens"):
            model(TOKENS, position_ids=POSITIONS, **settings)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(
    "collator",
    [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True, "return_position_ids": False}],
    ids=["positions", "flash", "seq_idx"],
)
def test_a_trainer_with_the_flattening_collator_sees_separate_texts(
    attention_type: str, collator: dict[str, Any], tmp_path: Any
) -> None:
    texts = [text.tolist() for row, lengths in zip(TOKENS, LENGTHS, strict=True) for text in row.split(lengths)]
    model = randomised(CottentionGPTForCausalLM(gpt_config(attention_type)), torch.float32, std=0.1)
    expected = sum(
        model(torch.tensor([text]), labels=torch.tensor([text]), num_items_in_batch=17).loss.item() for text in texts
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        max_steps=1,
        per_device_train_batch_size=7,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    data: Any = [{"input_ids": text} for text in texts]
    Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=DataCollatorWithFlattening(**collator)
    ).train()
    assert expected > 1
    trainer = Trainer(
        model=model, args=arguments, eval_dataset=data, data_collator=DataCollatorWithFlattening(**collator)
    )
    after = trainer.evaluate()["eval_loss"]
    assert after < expected
    separate = sum(
        model(torch.tensor([text]), labels=torch.tensor([text]), num_items_in_batch=17).loss.item() for text in texts
    )
    assert abs(after - separate) < 1e-4, "the mean over one batch of all texts"


@pytest.mark.slow
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(("kind", "make"), [GPTS[1], BERTS[2]])
def test_compiled_models_keep_texts_apart(kind: Any, make: Any, attention_type: str) -> None:
    torch._dynamo.reset()
    model = randomised(kind(make(attention_type)), torch.float32, std=0.1).train()
    compiled = torch.compile(model, fullgraph=True)
    told = [*ways(2).values()][4:5] + [*ways(2).values()][:1]
    for one in told:
        results = []
        for call in (model, compiled):
            model.zero_grad()
            out = call(TOKENS, labels=TOKENS, **one)
            out.loss.backward()
            results.append((out.logits, gradients(model)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    mask = torch.ones_like(TOKENS)
    with pytest.raises(RuntimeError, match="position_ids must not start again within a row beside an attention_mask"):
        compiled(TOKENS, attention_mask=mask, position_ids=POSITIONS)
    if kind is CottentionGPTForCausalLM:
        model.eval()
        with pytest.raises(RuntimeError, match="position_ids must not start again within a row where a compiled model"):
            compiled(TOKENS, position_ids=POSITIONS)
