"""What may be asked for, and how operations are counted."""

from __future__ import annotations

import math

import pytest

from cottention.benchmarks.settings import FULL_GRID, AttentionSettings, Workload
from cottention.errors import SettingsError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "gpu"}, "device must be of cpu, cuda; got 'gpu'"),
        ({"dtypes": ("float23",)}, "dtypes must be of .*; got 'float23'; did you mean 'float32'?"),
        ({"directions": ()}, "directions must name at least one of causal, bidirectional"),
        ({"lengths": ()}, "lengths must be whole numbers of at least 1"),
        ({"lengths": (64, 0)}, "lengths must be whole numbers of at least 1"),
        ({"batch_heads": ((0, 8),)}, "batch_heads must be whole numbers of at least 1"),
        ({"repeats": -1}, "repeats must be 0 .* or more; got -1"),
        ({"time_limit_s": 0.0}, "time_limit_s must be more than 0; got 0.0"),
        ({"time_limit_s": math.nan}, "time_limit_s must be more than 0; got nan"),
        ({"memory_limit_gib": -1.0}, "memory_limit_gib must be more than 0; got -1.0"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(values, message):
    with pytest.raises(SettingsError, match=message):
        AttentionSettings(**values)


def test_groups_differ_in_length_alone_and_go_from_short_to_long():
    groups = list(AttentionSettings(lengths=(512, 64, 512), head_dims=(32, 64)).groups())
    assert len(groups) == 2 * 2
    for group in groups:
        assert [workload.length for workload in group] == [64, 512]
        assert len({(workload.head_dim, workload.passes) for workload in group}) == 1


def test_useful_operations_are_counted_as_stated():
    values = {"dtype": "float32", "batch_size": 2, "num_heads": 8, "head_dim": 64, "length": 100}
    causal = Workload(direction="causal", passes="forward", **values)
    assert causal.useful_flops == 2 * 8 * 100 * (4 * 64 * 64 + 2 * 64 * 64)
    both = Workload(direction="causal", passes="forward+backward", **values)
    assert both.useful_flops == 3.5 * causal.useful_flops
    bidirectional = Workload(direction="bidirectional", passes="forward", **values)
    assert bidirectional.useful_flops == 2 * 8 * 100 * 4 * 64 * 64


def test_the_full_grid_is_the_one_that_was_promised():
    full = AttentionSettings(**FULL_GRID)
    assert full.lengths[0] == 128
    assert full.lengths[-1] == 65536
    assert full.head_dims == (32, 64, 128)
    assert sorted(B * H for B, H in full.batch_heads) == [1, 8, 96]
    assert full.dtypes == ("float32", "bfloat16")
