"""Lanes read on where they stopped, and the states that they carry give what one long forward gives."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from cottention.data.packing import pack_windows
from cottention.data.tokenization import tokenize_documents
from cottention.errors import CheckpointError, DataError
from cottention.layers import attention
from cottention.models.losses import IGNORE_INDEX
from cottention.training.carried import CarriedStates
from cottention.training.held_out_carried import CarriedHeldOut
from cottention.training.lanes import LaneStream, collate_lanes, own_lanes, read_windows
from cottention.training.stream import InOrder
from tests import tiny
from tests.models.helpers import gradients

FP32 = {"device_type": "cpu", "enabled": False}
LENGTH = 8
TEXTS = [tiny.TEXTS[0] * 3, "Order!", tiny.TEXTS[1], "A", tiny.TEXTS[0]]


def windows(texts: list[str] = TEXTS, tail: str = "drop") -> Any:
    """Short windows: some documents fill many, some lie within one."""
    tokens = tokenize_documents(Dataset.from_dict({"text": texts}), tiny.bpe_tokenizer())
    return pack_windows(tokens, LENGTH, 0, tail=tail)


def stream(num_lanes: int = 4, step_size: int = 4, num_steps: int = 40, seed: int = 0) -> LaneStream:
    """Several passes over the windows."""
    return LaneStream(windows(), num_lanes=num_lanes, step_size=step_size, num_steps=num_steps, seed=seed)


def places(order: LaneStream) -> list[Any]:
    """Everything in a stream, in its order."""
    return [order.place(position) for position in range(len(order))]


# Order


@pytest.mark.parametrize("step_size", [4, 2, 1])
def test_each_lane_reads_window_after_window(step_size: int) -> None:
    order = stream(step_size=step_size, num_steps=160 // step_size)
    num_windows = len(order.windows)
    for lane in range(4):
        own = [place for place in places(order) if place.lane == lane]
        assert len(own) == 40 > 3 * order.windows_per_lane, "several passes"
        for old, new in itertools.pairwise(own):
            if new.continues:
                assert new.row == (old.row + 1) % num_windows
                assert new.pass_number == old.pass_number
            else:
                assert new.pass_number == old.pass_number + 1


@pytest.mark.parametrize("step_size", [4, 2, 1])
def test_lanes_take_turns_and_keep_their_place_in_the_step(step_size: int) -> None:
    lanes = [place.lane for place in places(stream(step_size=step_size))]
    assert lanes == [i % 4 for i in range(len(lanes))]


@pytest.mark.parametrize("step_size", [4, 2])
def test_a_pass_reads_no_window_twice_and_leaves_out_fewer_than_there_are_lanes(step_size: int) -> None:
    order = stream(step_size=step_size)
    passes = [[place.row for place in places(order) if place.pass_number == number] for number in range(3)]
    for rows in passes[: 3 if step_size == 4 else 2]:
        assert max(Counter(rows).values()) == 1
        assert len(order.windows) - 4 < len(rows) <= len(order.windows)
    assert len({rows[0] for rows in passes}) > 1, "passes begin in other places"


def test_a_run_may_begin_with_windows_in_random_order() -> None:
    all_windows = windows()
    num = len(all_windows)
    afresh_steps = num // 2 + 3  # a pass and a part of the next
    order = LaneStream(all_windows, num_lanes=4, step_size=2, num_steps=80, seed=0, afresh_steps=afresh_steps)
    lanes = LaneStream(all_windows, num_lanes=4, step_size=2, num_steps=80 - afresh_steps, seed=0)
    begin, end = places(order)[: 2 * afresh_steps], places(order)[2 * afresh_steps :]
    assert not any(place.continues for place in begin)
    assert [place.lane for place in begin] == [0, 1] * afresh_steps, "each window stays on the process of its place"
    first_pass = [place.row for place in begin][:num]
    assert sorted(first_pass) == list(range(num)) != first_pass
    assert [place.pass_number for place in begin] == [i // num for i in range(len(begin))]
    assert [(place.lane, place.continues) for place in end] == [(p.lane, p.continues) for p in places(lanes)]
    assert {place.continues for place in end} == {True, False}
    assert min(place.pass_number for place in end) == 2
    assert [order.place(position) for position in reversed(range(len(order)))] == (begin + end)[::-1]


def test_the_seed_decides_the_order_and_nothing_read_before_does() -> None:
    first, again, other = (places(stream(seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    one = stream()
    assert [one.place(position) for position in reversed(range(len(one)))] == first[::-1]


def test_too_few_windows_are_refused() -> None:
    with pytest.raises(DataError, match=r"the text fills \d+ windows, too few for the 1000 lanes of data.carry_state"):
        stream(num_lanes=1000)


def test_every_token_but_the_first_is_a_target_once() -> None:
    all_windows = windows()
    batch = collate_lanes([{**row, "lane": 0, "continues": True} for row in read_windows(all_windows, [0, 1, 2])])
    ids = batch["input_ids"][0]
    following = torch.from_numpy(all_windows[3]["input_ids"][:1]).long()
    assert torch.equal(batch["shift_labels"][0], torch.cat([ids[1:], following]))
    last = len(all_windows) - 1
    (row,) = read_windows(all_windows, [last])
    assert row["next_id"] == IGNORE_INDEX


def test_windows_are_cut_where_documents_begin() -> None:
    ids = torch.arange(100, 108).int().numpy()
    rows = [
        {"input_ids": ids, "num_tokens": 8, "document_starts": [3], "next_id": 1, "lane": 0, "continues": True},
        {"input_ids": ids, "num_tokens": 8, "document_starts": [0, 5], "next_id": 2, "lane": 1, "continues": True},
        {"input_ids": ids, "num_tokens": 8, "document_starts": [], "next_id": 3, "lane": 2, "continues": False},
        {"input_ids": ids, "num_tokens": 6, "document_starts": [], "next_id": -100, "lane": 3, "continues": True},
    ]
    batch = collate_lanes(rows)
    assert batch["cu_seqlens"].tolist() == [0, 3, 8, 13, 16, 24, 30]
    assert batch["first_pieces"].tolist() == [0, 2, 4, 5]
    assert batch["continues"].tolist() == [True, False, False, True]
    assert batch["input_ids"][0, 24:].tolist() == [100, 101, 102, 103, 104, 105], "padding is not read"
    assert batch["shift_labels"][0, [7, 15, 23, 29]].tolist() == [1, 2, 3, IGNORE_INDEX]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # what a DataLoader does by default
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_workers_do_not_change_what_is_read() -> None:
    def loaded(**options: Any) -> list[dict[str, Tensor]]:
        order = stream(num_steps=6)
        return list(DataLoader(order, batch_size=2, sampler=InOrder(len(order)), collate_fn=collate_lanes, **options))

    several = loaded(num_workers=4, multiprocessing_context="fork", timeout=60)
    for got, expected in zip(several, loaded(), strict=True):
        assert {name: value.tolist() for name, value in got.items()} == {
            name: value.tolist() for name, value in expected.items()
        }


@pytest.mark.parametrize("step_size", [4, 2])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_lane_stays_on_its_process(num_processes: int, step_size: int) -> None:
    order = stream(step_size=step_size, num_steps=40 // step_size)
    for index in range(num_processes):
        loader = DataLoader(order, batch_size=1, sampler=InOrder(len(order)), collate_fn=collate_lanes)
        own = prepare_data_loader(loader, num_processes=num_processes, process_index=index, put_on_device=False)
        lanes = [int(batch["lanes"]) for batch in own]
        assert lanes == [lane for _ in range(10) for lane in own_lanes(4, 1, index, num_processes)]


# States


def carried_steps(model: Any, rows_by_step: list[list[dict[str, Any]]], limit: int | None = None) -> list[Any]:
    """Loss (a sum) and gradients of each step, states going from one to the next."""
    lanes = [row["lane"] for row in rows_by_step[0]]
    states = CarriedStates(model.config, lanes=lanes, limit=limit, dtype=model.dtype)
    found = []
    for rows in rows_by_step:
        batch = collate_lanes(rows)
        inputs, cache = states.open(batch)
        model.zero_grad()
        loss = model(**inputs, past_key_values=cache, use_cache=True, num_items_in_batch=1).loss
        loss.backward()
        states.close(batch, cache)
        found.append((loss.detach(), gradients(model)))
    return found


def one_document(model: Any, ids: Tensor, targets: Tensor, past: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loss and gradients of the tokens behind `past`, read with all of the document by one forward without states.

    What earlier tokens add to a later one's output is linear in their values: computed apart, as a constant.
    """
    plain = attention.cosine_attention

    def cut(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, **options: Any) -> Any:
        is_past = (torch.arange(v.shape[1]) < past)[None, :, None, None]
        before, _ = plain(q, k.detach(), v.detach() * is_past, norm_const.detach(), **options)
        since, _ = plain(q, k, v * ~is_past, norm_const, **options)
        return before + since, None

    model.zero_grad()
    with monkeypatch.context() as patch:
        patch.setattr(attention, "cosine_attention", cut)
        labels = targets.masked_fill(torch.arange(len(targets)) < past, IGNORE_INDEX)
        loss = model(ids[None], shift_labels=labels[None], num_items_in_batch=1).loss
    loss.backward()
    return loss.detach(), gradients(model)


def test_carried_windows_give_losses_and_gradients_of_one_long_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document of three windows beside one that begins in the middle of a window and goes on for two."""
    model = tiny.gpt().train()
    ids = torch.randint(1, 290, (2, 3 * LENGTH + 1), generator=torch.Generator().manual_seed(0))
    begins = [[0], [], []], [[0, 3], [], []]
    steps = [
        [
            {
                "input_ids": ids[lane, w * LENGTH : (w + 1) * LENGTH].numpy(),
                "num_tokens": LENGTH,
                "document_starts": begins[lane][w],
                "next_id": int(ids[lane, (w + 1) * LENGTH]),
                "lane": lane,
                "continues": w > 0,
            }
            for lane in range(2)
        ]
        for w in range(3)
    ]
    for w, (loss, grads) in enumerate(carried_steps(model, steps)):
        stop = (w + 1) * LENGTH
        documents = [(0, 0, stop, w * LENGTH), (1, 3, stop, max(w * LENGTH - 3, 0))]
        if w == 0:
            documents.append((1, 0, 3, 0))
        parts = [
            one_document(model, ids[lane, start:end], ids[lane, start + 1 : end + 1], past, monkeypatch)
            for lane, start, end, past in documents
        ]
        torch.testing.assert_close(loss, torch.stack([part[0] for part in parts]).sum())
        for name, gradient in grads.items():
            torch.testing.assert_close(gradient, torch.stack([part[1][name] for part in parts]).sum(0), msg=name)


def test_a_limit_starts_a_documents_state_anew() -> None:
    model = tiny.gpt().train()
    rows = [{**row, "lane": 0, "continues": True} for row in read_windows(windows([tiny.TEXTS[0] * 9]), [0, 1, 2, 3])]
    afresh = [{**row, "continues": i % 2 == 1} for i, row in enumerate(rows)]
    limited = carried_steps(model, [[row] for row in rows], limit=2 * LENGTH)
    expected = carried_steps(model, [[row] for row in afresh])
    assert [loss for loss, _ in limited] == [loss for loss, _ in expected]
    assert limited[2][0] != carried_steps(model, [[row] for row in rows])[2][0]


def test_what_does_not_go_on_reads_like_a_text_of_its_own() -> None:
    """A document at a window's edge, a new pass, a limit that was reached: nothing of the lane's past is left."""
    model = tiny.gpt()
    first, second = ([row] for row in read_windows(windows(), [0, 1]))
    fresh = collate_lanes([{**row, "lane": 0, "continues": False} for row in second])
    at_its_limit = collate_lanes([{**row, "lane": 0, "continues": True} for row in second])
    assert 0 not in second[0]["document_starts"]
    for batch, limit in ((fresh, None), (at_its_limit, LENGTH)):
        states = CarriedStates(model.config, lanes=[0], limit=limit, dtype=model.dtype)
        before = collate_lanes([{**row, "lane": 0, "continues": False} for row in first])
        inputs, cache = states.open(before)
        model(**inputs, past_key_values=cache, use_cache=True)
        states.close(before, cache)
        inputs, cache = states.open(batch)
        loss = model(**inputs, past_key_values=cache, use_cache=True).loss
        torch.testing.assert_close(loss, model(**inputs).loss, rtol=1e-12, atol=0)


def test_states_are_saved_and_taken_up_by_lane(tmp_path: Path) -> None:
    model = tiny.gpt().train()
    order = stream()
    steps = [[order[4 * step + lane] for lane in range(4)] for step in range(5)]
    expected = carried_steps(model, steps)
    whole = CarriedStates(model.config, lanes=range(4), dtype=model.dtype)
    for rows in steps[:3]:
        batch = collate_lanes(rows)
        inputs, cache = whole.open(batch)
        model(**inputs, past_key_values=cache, use_cache=True)
        whole.close(batch, cache)
    assert whole.nbytes == sum(tensor.nbytes for tensor in whole.to_tensors().values())
    save_file(whole.to_tensors(), tmp_path / "states.safetensors")
    losses = []
    for lanes in ([0, 2], [1, 3]):
        half = CarriedStates(model.config, lanes=lanes, dtype=model.dtype)
        half.load(tmp_path / "states.safetensors")
        batch = collate_lanes([steps[3][lane] for lane in lanes])
        inputs, cache = half.open(batch)
        losses.append(model(**inputs, past_key_values=cache, use_cache=True, num_items_in_batch=1).loss.detach())
    torch.testing.assert_close(torch.stack(losses).sum(), expected[3][0])


def test_states_of_another_model_are_refused(tmp_path: Path) -> None:
    states = CarriedStates(tiny.gpt().config, lanes=range(2))
    with pytest.raises(CheckpointError, match=r"has no states.safetensors: it cannot go on with carried states"):
        states.load(tmp_path / "states.safetensors")
    save_file(states.to_tensors(), tmp_path / "states.safetensors")
    with pytest.raises(CheckpointError, match=r"the states of another model; layers.0.kv does not fit"):
        CarriedStates(tiny.gpt().config, lanes=[2]).load(tmp_path / "states.safetensors")


# Held-out text


def test_held_out_loss_is_that_of_whole_documents_and_of_windows_alone() -> None:
    model = tiny.gpt()
    held_out = windows(tail="pad")
    assert int(held_out[len(held_out) - 1]["num_tokens"]) < LENGTH
    measured = CarriedHeldOut(held_out, num_lanes=1, max_windows=10**6, targets_per_byte=0.5).measure(model, FP32)
    ids = torch.cat([torch.from_numpy(row["input_ids"][: row["num_tokens"]]).long() for row in held_out])
    starts = [i * LENGTH + int(start) for i, row in enumerate(held_out) for start in row["document_starts"]]
    assert len(starts) == len(TEXTS)
    targets = torch.cat([ids[1:], torch.tensor([IGNORE_INDEX])])

    def loss(bounds: set[int]) -> float:
        cu_seqlens = torch.tensor([*sorted(bounds), len(ids)], dtype=torch.int32)
        return model(ids[None], shift_labels=targets[None], cu_seqlens=cu_seqlens).loss.item()

    carried, reset = loss(set(starts)), loss({*starts, *range(0, len(ids), LENGTH)})
    assert measured["val_loss"] == pytest.approx(carried, rel=1e-9)
    assert measured["val_reset_loss"] == pytest.approx(reset, rel=1e-9)
    assert carried != pytest.approx(reset, rel=1e-3)
    assert measured["val_nats_per_byte"] == pytest.approx(carried / 2, rel=1e-9)
    assert measured["val_ppl"] == pytest.approx(torch.tensor(carried).exp().item(), rel=1e-6)


def test_side_by_side_stretches_are_read_as_one_after_the_other() -> None:
    model, held_out = tiny.gpt(), windows(tail="pad")
    together = CarriedHeldOut(held_out, num_lanes=4, max_windows=10**6)
    assert {len(stretch) for stretch in together._stretches} == {len(held_out) // 4, len(held_out) // 4 + 1}
    sums = torch.zeros(2, dtype=torch.float64)
    for stretch in together._stretches:
        alone = CarriedHeldOut(held_out, num_lanes=1, max_windows=10**6)
        alone._stretches = [stretch]
        num_targets = sum(int(held_out[row]["num_tokens"]) for row in stretch) - (stretch[-1] == len(held_out) - 1)
        loss = alone.measure(model, FP32)["val_loss"]
        sums += torch.tensor([loss * num_targets, num_targets], dtype=torch.float64)
    assert together.measure(model, FP32)["val_loss"] == pytest.approx((sums[0] / sums[1]).item(), rel=1e-9)


def test_an_evaluation_reads_as_many_windows_as_it_may() -> None:
    few = CarriedHeldOut(windows(), num_lanes=2, max_windows=5)
    assert [len(stretch) for stretch in few._stretches] == [2, 2]
    assert few._stretches[1].start == len(windows()) // 2
    assert [len(stretch) for stretch in CarriedHeldOut(windows(), num_lanes=2, max_windows=1)._stretches] == [1, 1]
