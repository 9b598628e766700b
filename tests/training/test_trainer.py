"""One step of training: its loss, its gradients, its precision, and what stops it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cottention.models import CottentionGPTForCausalLM
from cottention.training import checkpoints, trainer
from cottention.training.arguments import compute_type
from cottention.training.checkpointing_trainer import NonFiniteLossError
from cottention.training.held_out import HeldOut
from cottention.training.pretraining import pretrain
from cottention.training.recipe import Recipe
from cottention.training.stream import ExampleStream
from cottention.training.text import prepare_text
from tests.training.helpers import metrics_of, steps_of, tiny_recipe, weights_of

# Windows of a BERT have different numbers of targets. Those of a GPT have the same; kept apart, they lie in one row.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("gpt", {}),
    "gpt with documents apart": ("gpt", {"data__reset_at_documents": True}),
    "bert": ("bert", {}),
    "bert with next-sentence head": ("bert", {"model__next_sentence_head": True}),
}


def short(arch: str, corpus: Path, **changes: Any) -> Any:
    """Three steps without dropout, all logged."""
    settings = {"model__dropout": 0.0, "training__max_steps": 3, "training__log_every": 1, **changes}
    return tiny_recipe(arch, corpus, **settings)


def gradients_of(recipe: Recipe, run_dir: Path) -> list[list[Tensor]]:
    """Pretrain, and give the gradients of every update."""
    seen: list[list[Tensor]] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = optimizer.param_groups[0]["params"]
        seen.append([p.grad.clone() for p in parameters if p.grad is not None])

    hook = register_optimizer_step_pre_hook(note)
    try:
        pretrain(recipe, output_dir=run_dir)
    finally:
        hook.remove()
    return seen


def losses_of(run_dir: Path) -> list[float]:
    """Training losses in metrics.jsonl."""
    return [line["loss"] for line in metrics_of(run_dir) if "loss" in line]


def assert_same_gradients(got: list[list[Tensor]], expected: list[list[Tensor]], rtol: float) -> None:
    """Every update's gradients, each relative to its norm."""
    assert len(got) == len(expected) == 3
    for update, (ours, truth) in enumerate(zip(got, expected, strict=True)):
        assert len(ours) == len(truth) > 0
        for gradient, true_gradient in zip(ours, truth, strict=True):
            error = (gradient - true_gradient).norm() / (true_gradient.norm() + 1e-6)
            assert error < rtol, (update, tuple(gradient.shape), error.item())


@pytest.mark.parametrize("kind", KINDS)
def test_four_micro_batches_give_the_loss_and_gradients_of_one(kind: str, corpus: Path, tmp_path: Path) -> None:
    arch, changes = KINDS[kind]
    whole = gradients_of(short(arch, corpus, training__micro_batch_size=8, **changes), tmp_path / "1")
    parts = gradients_of(short(arch, corpus, training__micro_batch_size=2, **changes), tmp_path / "4")
    assert losses_of(tmp_path / "4") == pytest.approx(losses_of(tmp_path / "1"), rel=1e-6)
    assert_same_gradients(parts, whole, rtol=1e-5)  # fp32 sums in another order; 2e-6 measured


def test_the_logged_loss_is_the_mean_over_all_targets(corpus: Path, tmp_path: Path) -> None:
    """Before the first update, whose rate is 0, the model is known: the loss can be computed by hand."""
    recipe = short("gpt", corpus, training__max_steps=1, data__reset_at_documents=True)
    pretrain(recipe, output_dir=tmp_path / "run")
    model = CottentionGPTForCausalLM.from_pretrained(tmp_path / "run" / "model").double().eval()
    text = prepare_text(recipe, tmp_path / "run")
    stream = ExampleStream(text.train, num_examples=8, seed=0)
    nats, num_targets = 0.0, 0
    for row in stream.__getitems__(list(range(8))):
        batch = text.collator([row])
        outputs = model(input_ids=batch["input_ids"], cu_seqlens=batch["cu_seqlens"], use_cache=False)
        log_probabilities = outputs.logits.log_softmax(-1)[0]
        for position, target in enumerate(row["input_ids"][1:]):
            nats -= log_probabilities[position, int(target)].item()
            num_targets += 1
    assert losses_of(tmp_path / "run") == [pytest.approx(nats / num_targets, rel=1e-6)]


@pytest.mark.parametrize("arch", ["gpt", "bert"])
@pytest.mark.slow
def test_recomputed_activations_give_the_same_run(arch: str, corpus: Path, tmp_path: Path) -> None:
    """Dropout included: what is recomputed drops out the same units."""
    plain = gradients_of(short(arch, corpus, model__dropout=0.2), tmp_path / "plain")
    changes = {"model__dropout": 0.2, "training__gradient_checkpointing": True}
    recomputed = gradients_of(short(arch, corpus, **changes), tmp_path / "recomputed")
    assert_same_gradients(recomputed, plain, rtol=1e-6)
    assert losses_of(tmp_path / "recomputed") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-7)


@pytest.mark.parametrize("arch", ["gpt", pytest.param("bert", marks=pytest.mark.slow)])
def test_bf16_computes_in_bf16_and_keeps_the_weights_in_fp32(arch: str, corpus: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        pretrain(
            short(arch, corpus, training__precision=precision, training__max_steps=8), output_dir=tmp_path / precision
        )
    full, half = losses_of(tmp_path / "fp32"), losses_of(tmp_path / "bf16")
    assert half != full
    assert half == pytest.approx(full, rel=5e-3)  # bf16 has 8 bits: 4e-3 a value
    weights = weights_of(tmp_path / "bf16" / "model")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    # Weights kept in bf16 would be unchanged by a cast to it and back.
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())
    held_out = [line["val_loss"] for line in metrics_of(tmp_path / "bf16") if "val_loss" in line]
    assert held_out == pytest.approx(
        [line["val_loss"] for line in metrics_of(tmp_path / "fp32") if "val_loss" in line], rel=5e-3
    )


def test_auto_precision_is_fp32_on_a_cpu(corpus: Path) -> None:
    recipe = tiny_recipe("gpt", corpus)
    assert recipe.training.precision == "auto"
    assert compute_type(recipe, torch.device("cpu")) == torch.float32


def test_gradients_are_clipped_and_their_norm_is_logged_unclipped(corpus: Path, tmp_path: Path) -> None:
    free = gradients_of(short("gpt", corpus), tmp_path / "free")
    clipped = gradients_of(short("gpt", corpus, optimizer__max_grad_norm=0.25), tmp_path / "clipped")
    norms = [torch.nn.utils.get_total_norm(update).item() for update in free]
    logged = [line["grad_norm"] for line in metrics_of(tmp_path / "free") if "loss" in line]
    assert logged == pytest.approx(norms, rel=1e-6)
    assert min(norms) > 0.25
    for update in clipped:
        assert torch.nn.utils.get_total_norm(update).item() == pytest.approx(0.25, rel=1e-4)
    # The first gradient is that of the same weights.
    assert metrics_of(tmp_path / "clipped")[0]["grad_norm"] == pytest.approx(norms[0], rel=1e-6)
    for ours, truth in zip(clipped[0], free[0], strict=True):
        torch.testing.assert_close(ours, truth * (0.25 / norms[0]), rtol=1e-4, atol=1e-9)


# What stops a run


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(
    corpus: Path, tmp_path: Path
) -> None:
    # The rate rises to 1e38 in 8 steps of warmup: weights overflow, the loss follows one step later.
    recipe = tiny_recipe(
        "gpt", corpus, optimizer__learning_rate=1e38, optimizer__warmup_steps=8, training__save_every=1
    )
    with pytest.raises(NonFiniteLossError) as caught:
        pretrain(recipe, output_dir=tmp_path / "run")
    said = re.fullmatch(
        r"the (loss|gradient|held-out loss) became infinite or NaN at step (\d+); last good checkpoint: (\S+); "
        r"a smaller optimizer\.learning_rate, a longer warmup or optimizer\.max_grad_norm may help",
        str(caught.value),
    )
    assert said is not None, str(caught.value)
    step, good = int(said[2]), Path(said[3])
    assert checkpoints.damage(good) is None
    assert checkpoints.checkpoint_step(good) < step
    assert all(math.isfinite(value) for line in metrics_of(tmp_path / "run") for value in line.values())
    assert not (tmp_path / "run" / "model").exists()
    for name, tensor in weights_of(good).items():
        assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize(
    ("bad_step", "save_every", "named"),
    [
        (7, 3, "last good checkpoint: {}/checkpoint-3;"),  # 6 left the weights that gave the loss of 7
        (8, 3, "last good checkpoint: {}/checkpoint-6;"),
        (2, 3, "no checkpoint was written yet;"),
    ],
)
def test_the_checkpoint_that_is_named_gave_a_finite_loss(
    bad_step: int, save_every: int, named: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, calls = trainer.PretrainingTrainer.compute_loss, 0

    def infinite_at(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        loss = compute(self, *args, **options)
        return loss * math.inf if calls == 4 * (bad_step - 1) + 2 else loss  # the second of four micro batches

    monkeypatch.setattr(trainer.PretrainingTrainer, "compute_loss", infinite_at)
    with pytest.raises(NonFiniteLossError) as caught:
        pretrain(tiny_recipe("gpt", corpus, training__save_every=save_every), output_dir=tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert str(caught.value).startswith(
        f"the loss became infinite or NaN at step {bad_step}; {named.format(folder)} a smaller"
    )
    assert calls == 4 * (bad_step - 1) + 2, "it stops at once"
    assert max((line["step"] for line in metrics_of(tmp_path / "run")), default=0) < bad_step


@pytest.mark.parametrize(("bad_step", "due"), [(4, "a log line"), (5, "an evaluation"), (3, "a checkpoint")])
def test_a_gradient_that_is_not_finite_is_neither_logged_nor_saved(
    bad_step: int, due: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm, calls = trainer.PretrainingTrainer._get_grad_norm, 0

    def infinite_at(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = norm(self, *args, **options)
        if calls == bad_step:
            self._grad_norm = result * math.inf
        return result

    monkeypatch.setattr(trainer.PretrainingTrainer, "_get_grad_norm", infinite_at)
    with pytest.raises(NonFiniteLossError, match=f"the gradient became infinite or NaN at step {bad_step};"):
        pretrain(tiny_recipe("gpt", corpus), output_dir=tmp_path / "run")
    assert all(
        step < bad_step
        for step in [*steps_of(tmp_path / "run"), *(line["step"] for line in metrics_of(tmp_path / "run"))]
    )


def test_a_held_out_loss_that_is_not_finite_is_neither_logged_nor_saved(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeldOut, "measure", lambda *_: {"val_loss": math.nan, "val_ppl": math.nan})
    with pytest.raises(
        NonFiniteLossError, match=r"the held-out loss became infinite or NaN at step 5; last good .*-3;"
    ):
        pretrain(tiny_recipe("gpt", corpus), output_dir=tmp_path / "run")
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # likewise
@pytest.mark.parametrize("arch", ["gpt", "bert"])
def test_a_compiled_model_trains_the_same(arch: str, corpus: Path, tmp_path: Path) -> None:
    plain = gradients_of(short(arch, corpus), tmp_path / "plain")
    compiled = gradients_of(short(arch, corpus, training__compile=True), tmp_path / "compiled")
    assert_same_gradients(compiled, plain, rtol=1e-5)
    assert losses_of(tmp_path / "compiled") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-6)
    assert weights_of(tmp_path / "compiled" / "model").keys() == weights_of(tmp_path / "plain" / "model").keys()
    assert json.loads((tmp_path / "compiled" / "model" / "config.json").read_text())["model_type"].startswith(
        "cottention"
    )
