"""A model over slices of texts has the loss and the gradients of the model over whole texts."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.model_checks import MODELS, check_loss_and_gradients, check_training
from tests.distributed.ranks import Ranks


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_models_equal_one_process(ranks: Ranks, size: int) -> None:
    ranks.run(check_loss_and_gradients, list(MODELS), torch.float64, 1e-10, size=size)


def test_models_equal_one_process_in_float32(ranks: Ranks) -> None:
    ranks.run(check_loss_and_gradients, ["gpt_plus", "bert"], torch.float32, 1e-5, size=2)


@pytest.mark.slow
def test_training_on_slices_has_the_curve_of_one_process(ranks: Ranks) -> None:
    ranks.run(check_training, "gpt_plus", size=4)
