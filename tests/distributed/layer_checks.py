"""What `test_sequence.py` runs on every rank: layers over slices, bytes, derivatives, refusals, FSDP2 beside it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cottention import CosineAttention, cosine_attention
from cottention.distributed import count_traffic, shard_sequence, slice_batch, traffic_of_layer
from cottention.layers import AttentionState, SoftmaxAttention
from cottention.models import CottentionGPTConfig, CottentionGPTForCausalLM, CottentionGPTForSequenceClassification
from cottention.ops import CosineState
from tests.distributed.model_checks import batch_of, model_of

LENGTHS = {2: (9, 8), 4: (2, 0, 9, 6)}
_CAUSAL: dict[str, Any] = {"causal": True, "rotary_dim": 4}


def _layer(options: dict[str, Any]) -> CosineAttention:
    torch.manual_seed(3)
    layer = CosineAttention(8, 2, **options).double()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def check_states_go_through(group: dist.ProcessGroup) -> None:
    """A text in two windows, each over all ranks, with the state between them; positions are the layer's own."""
    for options in (
        {},
        {"decay": "data", "divisor": "query"},
        {"short_conv": 3, "decay": "data", "erase": True, "output_norm": True, "output_gate": "sigmoid"},
    ):
        whole = _layer(_CAUSAL | options)
        shared = shard_sequence(copy.deepcopy(whole), group)
        lengths = LENGTHS[group.size()]
        torch.manual_seed(4)
        x = torch.randn(2, 2 * sum(lengths), 8, dtype=torch.float64)
        mask = torch.rand(2, 2 * sum(lengths)) > 0.3
        expected = whole(x, attention_mask=mask)[0]
        expected.square().sum().backward()
        state: CosineState | AttentionState | None = None
        losses = []
        for window, window_mask, wanted in zip(x.chunk(2, 1), mask.chunk(2, 1), expected.chunk(2, 1), strict=True):
            own, own_mask, own_wanted = (each.split(lengths, 1)[group.rank()] for each in (window, window_mask, wanted))
            o, state = shared(own, attention_mask=own_mask, initial_state=state, output_final_state=True)
            torch.testing.assert_close(o, own_wanted.detach(), rtol=1e-10, atol=1e-10)
            losses.append(o.square().sum())
        torch.stack(losses).sum().backward()
        for (name, parameter), other in zip(whole.named_parameters(), shared.parameters(), strict=True):
            assert parameter.grad is not None, name
            gradient = torch.zeros_like(parameter) if other.grad is None else other.grad
            dist.all_reduce(gradient, group=group)
            error = (gradient - parameter.grad).abs().max() / parameter.grad.abs().max().clamp(min=1e-6)
            assert error < 1e-9, f"{name} is off by {error:.1e} with {options}"


def check_second_derivatives(group: dist.ProcessGroup) -> None:
    """A penalty on the gradient: what flows through two backward passes over the ranks is that of one process."""
    for gates, causal in (((), True), (("log_decay",), True), (("log_decay", "beta"), True), (("log_decay",), False)):
        torch.manual_seed(5)
        whole = [torch.randn(1, 6, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        m = torch.randn(2, dtype=torch.float64)
        given = {name: -torch.rand(1, 6, 2, dtype=torch.float64) for name in gates}
        given = {name: -x if name == "beta" else x for name, x in given.items()}
        lengths = (3, 3) if group.size() == 2 else (2, 1, 0, 3)

        def own(x: Tensor, lengths: tuple[int, ...] = lengths) -> Tensor:
            return x.split(lengths, 1)[group.rank()].detach()

        mine = [own(x).requires_grad_() for x in whole]
        own_given = {name: own(x) for name, x in given.items()}
        found = []
        for inputs, gate, others in ((whole, given, {}), (mine, own_given, {"process_group": group})):
            o = cosine_attention(*inputs, m, causal=causal, **gate, **others)[0]  # type: ignore[arg-type]
            gradients = torch.autograd.grad(o.pow(3).sum(), inputs, create_graph=True)
            penalty = torch.stack([each.square().sum() for each in gradients]).sum()
            found.append(torch.autograd.grad(penalty, inputs))
        for expected, second in zip(*found, strict=True):
            torch.testing.assert_close(second, own(expected), rtol=1e-9, atol=1e-9)


def check_bytes(group: dist.ProcessGroup) -> None:
    """Counted and by formula, forward and backward; the same for a text eight times as long."""
    cases: tuple[dict[str, Any], ...] = (
        {"causal": True},
        {"causal": True, "decay": "learned"},
        {"causal": True, "decay": "data", "erase": True, "short_conv": 4},
        {"causal": False},
        {"causal": False, "decay": "fixed", "short_conv": 3},
    )
    for options in cases:
        layer = shard_sequence(CosineAttention(12, 3, **options), group)
        said = traffic_of_layer(
            ranks=group.size(),
            rows=2,
            heads=3,
            key_dim=4,
            value_dim=4,
            causal=options["causal"],
            decay="decay" in options,
            erase="erase" in options,
            short_conv=options.get("short_conv", 0),
        )
        for T in (5, 40):
            x = torch.randn(2, T, 12, requires_grad=True)
            with count_traffic() as forward:
                o = layer(x)[0]
            with count_traffic() as backward:
                o.sum().backward()
            counted = forward.num_bytes["gather"] + forward.num_bytes["sum"]
            assert counted == sum(said), f"{counted} bytes, {said} with {options}"
            assert backward.num_bytes["scatter"] == said.gathered
            assert backward.num_bytes["sum"] == said.summed
            assert backward.num_bytes["gather"] == 0


def check_refusals(group: dist.ProcessGroup) -> None:
    """What a slice cannot do is said, in one line, before any rank waits for another."""
    model: Any = shard_sequence(model_of("gpt", torch.float32), group)
    batch = slice_batch(model, batch_of("gpt", "plain", 0))
    ids = batch["input_ids"]
    with pytest.raises(ValueError, match="shift_labels"):
        model(input_ids=ids, position_ids=batch["position_ids"], labels=ids, num_items_in_batch=3)
    with pytest.raises(ValueError, match="num_items_in_batch"):
        model(**{**batch, "num_items_in_batch": None})
    with pytest.raises(ValueError, match="position_ids"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="use_cache"):
        model(input_ids=ids, position_ids=batch["position_ids"], use_cache=True)
    with pytest.raises(ValueError, match="boundaries of the whole row; got seq_idx"):
        model(input_ids=ids, position_ids=batch["position_ids"], seq_idx=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="maps and process_group exclude"):
        model(input_ids=ids, position_ids=batch["position_ids"], output_attentions=True)
    with pytest.raises(ValueError, match="it shares no sequence"):
        slice_batch(model_of("gpt", torch.float32), {"input_ids": ids})
    config = CottentionGPTConfig(vocab_size=8, n_embd=8, n_layer=1, n_head=2)
    with pytest.raises(TypeError, match="which reads whole texts"):
        shard_sequence(CottentionGPTForSequenceClassification(config), group)
    with pytest.raises(ValueError, match="attention layers of cottention"):
        shard_sequence(nn.Linear(2, 2), group)
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup"):
        shard_sequence(model, "all")
    q = torch.randn(1, 3, 2, 4)
    with pytest.raises(NotImplementedError, match=r"no torch\.func"):
        torch.func.grad(lambda x: cosine_attention(x, q, q, None, causal=True, process_group=group)[0].sum())(q)
    softmax = shard_sequence(SoftmaxAttention(8, 2, causal=True), group)
    with pytest.raises(ValueError, match="a state of keys and values and process_group"):
        softmax(torch.randn(1, 3, 8), output_final_state=True)
    with pytest.raises(ValueError, match="through all ranks of process_group"):
        cosine_attention(q, q, q, None, causal=True, cu_seqlens=torch.tensor([0, 3]), process_group=group)
    shard_sequence(model, None)
    assert model(input_ids=ids, labels=ids).loss.isfinite()


def check_beside_fsdp(group: dist.ProcessGroup, steps: int) -> None:
    """Two ranks share each sequence, two shard the weights: losses and gradients of one process."""
    warnings.simplefilter("default")  # torch's own, of FSDP2 on a CPU
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sequence", "shard"))
    whole: Any = model_of("gpt_plus", torch.float64)
    shared: Any = shard_sequence(copy.deepcopy(whole), mesh["sequence"])
    assert isinstance(shared, CottentionGPTForCausalLM)
    for block in shared.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(shared, mesh=mesh)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (whole, shared)]
    for step in range(steps):
        batch = batch_of("gpt_plus", "padded", seed=step)
        targets = (batch["labels"][:, 1:] != -100).sum()
        row = mesh["shard"].get_local_rank()
        mine = {name: x[row : row + 1] for name, x in batch.items()} | {"num_items_in_batch": targets}
        loss = whole(**batch).loss
        share = shared(**slice_batch(shared, mine)).loss
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        (share * dist.get_world_size()).backward()  # FSDP2 averages over all four
        total = share.detach().clone()
        dist.all_reduce(total)
        assert abs(total - loss.detach()) <= 1e-10 * abs(loss.detach()), f"step {step}: {total} is not {loss}"
        for (name, parameter), other in zip(whole.named_parameters(), shared.named_parameters(), strict=True):
            assert parameter.grad is not None, name
            gradient: Any = other[1].grad
            torch.testing.assert_close(gradient.full_tensor(), parameter.grad, rtol=1e-9, atol=1e-10)
        for optimizer in optimizers:
            optimizer.step()
