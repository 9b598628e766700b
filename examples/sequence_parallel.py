"""Trains a small GPT on texts of which each process holds a slice, and shows what the layers exchange.

    torchrun --nproc-per-node 2 examples/sequence_parallel.py

The texts are made up: numbers that count up by steps which differ from text to text. Beside the loss over all processes
stands that of a model on whole texts, trained in each process from the same start.
"""

from __future__ import annotations

import copy
import os

import torch
import torch.distributed as dist
from torch import nn

from cottention.distributed import count_traffic, shard_sequence, slice_batch, sum_gradients
from cottention.models import CottentionGPTConfig, CottentionGPTForCausalLM

STEPS, B, T, VOCAB = 30, 8, 48, 12


def main() -> None:
    """Every process runs this."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    group = dist.group.WORLD
    torch.manual_seed(0)  # the same weights and the same texts on every process
    config = CottentionGPTConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, rotary_dim=16, short_conv=4)
    model = CottentionGPTForCausalLM(config)
    nn.Module.to(model, torch.device(device))
    whole = copy.deepcopy(model)
    shard_sequence(model, group)
    optimizer, other = (torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (model, whole))
    for step in range(STEPS):
        ids = (torch.randint(VOCAB, (B, 1)) + torch.arange(T) * torch.randint(1, 4, (B, 1))).remainder(VOCAB).to(device)
        part = slice_batch(model, {"input_ids": ids, "labels": ids})
        with count_traffic() as traffic:
            loss = model(**part).loss  # this process's share of the loss
            loss.backward()
        sum_gradients(model, group)
        optimizer.step()
        optimizer.zero_grad()
        expected = whole(input_ids=ids, labels=ids).loss
        expected.backward()
        other.step()
        other.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if dist.get_rank() == 0 and step % 10 in (0, 9):
            tokens = part["input_ids"].shape[1]
            print(
                f"step {step}: loss {total:.4f}, on whole texts {expected:.4f}; "
                f"{tokens} tokens a row here, {traffic.total:,} bytes exchanged"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
