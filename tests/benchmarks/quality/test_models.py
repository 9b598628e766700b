"""Models of the study: as many parameters as each other, and the state they say."""

from __future__ import annotations

import pytest
import torch

from cottention.benchmarks.quality.cells import EXPERIMENTS, SIZES, all_cells, cells_like, options_of, sweep_of
from cottention.benchmarks.quality.models import (
    MOST_APART,
    matched_config,
    num_parameters,
    parameter_groups,
    state_bytes,
)
from cottention.errors import SettingsError
from cottention.models import CottentionGPTForCausalLM

_SHAPES = sorted({(plan.size, variant) for plan in EXPERIMENTS.values() for variant in plan.variants})


@pytest.mark.parametrize("size", sorted({size for size, _ in _SHAPES}))
def test_variants_have_equal_parameters_within_one_percent(size: str) -> None:
    wanted = num_parameters(matched_config(size, "cosine", 512, 64))
    for variant in (variant for each, variant in _SHAPES if each == size):
        found = num_parameters(matched_config(size, variant, 512, 64))
        assert abs(found - wanted) <= MOST_APART * wanted, variant


def test_every_variant_has_a_sweep_that_chooses_its_rate() -> None:
    assert not {(cell.experiment, cell.variant) for cell in all_cells() if not sweep_of(cell)}


def test_a_count_is_that_of_the_model() -> None:
    config = matched_config("tiny", "cosine", 100, 32)
    assert num_parameters(config) == sum(each.numel() for each in CottentionGPTForCausalLM(config).parameters())


def test_a_cosine_state_does_not_grow_and_a_cache_does() -> None:
    size = SIZES["tiny"]
    head_dim = size.n_embd // size.n_head
    cosine, softmax = (CottentionGPTForCausalLM(matched_config("tiny", each, 50, 64)) for each in ("cosine", "softmax"))
    assert state_bytes(cosine, 16) == state_bytes(cosine, 64) == 4 * size.n_layer * size.n_head * head_dim**2
    assert [state_bytes(softmax, T) for T in (16, 64)] == [4 * size.n_layer * 2 * T * size.n_embd for T in (16, 64)]


def test_weight_decay_is_for_matrices() -> None:
    model = CottentionGPTForCausalLM(matched_config("tiny", "cosine", 50, 64))
    decayed, others = (set(map(id, group["params"])) for group in parameter_groups(model, 0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed | others == set(names)
    assert all(names[each].endswith(".weight") and "ln" not in names[each] for each in decayed)
    assert {names[each].rsplit(".", 1)[-1] for each in others} == {"bias", "weight", "norm_const"}


def test_names_are_unique_and_found_again() -> None:
    names = [cell.name for cell in all_cells()]
    assert len(set(names)) == len(names)
    assert [cell.name for cell in cells_like(names[:3])] == names[:3]
    assert all(cell.plan.unattended for cell in cells_like([]))


def test_what_does_not_exist_is_refused_with_a_suggestion() -> None:
    with pytest.raises(SettingsError, match="did you mean 'lm-1m/cosine/seed-0'"):
        cells_like(["lm-1m/cosin/seed-0"])
    with pytest.raises(SettingsError, match="got 'convv'; did you mean 'conv'"):
        options_of("cosine+convv")


def test_a_sweep_and_a_score_share_no_seed() -> None:
    seeds = {
        cell.chooses: {other.seed for other in all_cells() if other.chooses == cell.chooses} for cell in all_cells()
    }
    assert not seeds[True] & seeds[False]


def test_the_same_seed_gives_the_same_weights() -> None:
    from cottention.benchmarks.quality.models import new_model

    cell = cells_like(["small/cosine/seed-0"])[0]
    one, again = (torch.cat([each.flatten() for each in new_model(cell, 50).parameters()]) for _ in range(2))
    assert torch.equal(one, again)
