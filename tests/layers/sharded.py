"""A layer whose parameters are sharded over two processes gives the outputs and gradients of a whole one.

Not collected by itself: `test_sharded.py` starts it under torchrun, one implementation a run. By hand:

    TRITON_INTERPRET=1 torchrun --nproc-per-node 2 tests/layers/sharded.py triton
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cottention import CosineAttention


def main(implementation: str) -> None:
    """Compare this rank's rows of the batch, and the mean gradients, with one process that has all rows."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = CosineAttention(32, num_attention_heads=2, causal=True, rotary_dim=8, implementation=implementation)
    x = torch.randn(world_size, 37, 32)
    mask = torch.ones(world_size, 37, dtype=torch.long)
    mask[-1, :5] = 0
    sharded = copy.deepcopy(whole)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (world_size,)))
    expected = whole(x, attention_mask=mask)[0]
    expected.square().mean().backward()
    found = sharded(x[rank : rank + 1], attention_mask=mask[rank : rank + 1])[0]
    found.square().mean().backward()
    torch.testing.assert_close(found, expected[rank : rank + 1].detach())
    gradients = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        assert isinstance(parameter.grad, DTensor), name
        torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name].grad, rtol=1e-4, atol=1e-7)
    norm_const_gradient = gradients["norm_const"].grad
    assert norm_const_gradient is not None
    assert norm_const_gradient.abs().max() > 0
    dist.destroy_process_group()
    print(f"rank {rank}: same")


if __name__ == "__main__":
    main(sys.argv[1])
