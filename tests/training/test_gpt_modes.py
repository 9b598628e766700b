"""Pretraining of a GPT in each mode: what a step computes, how a run goes on, and which settings exclude each other."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cottention.errors import SettingsError
from cottention.training.pretraining import build_model, pretrain
from cottention.training.recipe_sections import GPTDataSettings
from cottention.training.text import prepare_text
from tests.training import victims
from tests.training.helpers import assert_same_run, in_child, metrics_of, steps_of, tiny_recipe, write_corpus
from tests.training.test_trainer import assert_same_gradients, gradients_of, losses_of, short

CARRIED = {"data__carry_state": True, "data__split_by": "document"}
MODES: dict[str, dict[str, Any]] = {
    "packed": {},
    "carried": CARRIED,
    "document": {"data__mode": "document"},
}
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents of many windows."""
    folder = tmp_path_factory.mktemp("books")
    for number in range(3):
        write_corpus(folder / f"{number}.txt", num_paragraphs=17 + number, seed=number)
    return folder


def source_of(mode: str, corpus: Path, books: Path) -> Path:
    """Long documents where states are carried."""
    return books if mode == "carried" else corpus


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow
def test_four_micro_batches_give_the_losses_and_gradients_of_one(
    mode: str, corpus: Path, books: Path, tmp_path: Path
) -> None:
    source = source_of(mode, corpus, books)
    whole = gradients_of(short("gpt", source, training__micro_batch_size=8, **MODES[mode]), tmp_path / "1")
    parts = gradients_of(short("gpt", source, training__micro_batch_size=2, **MODES[mode]), tmp_path / "4")
    assert losses_of(tmp_path / "4") == pytest.approx(losses_of(tmp_path / "1"), rel=1e-6)
    assert_same_gradients(parts, whole, rtol=1e-5)  # fp32 sums in another order


@pytest.mark.parametrize("mode", MODES)
def test_the_fused_loss_changes_nothing_but_the_memory(mode: str, corpus: Path, books: Path, tmp_path: Path) -> None:
    source = source_of(mode, corpus, books)
    fused = gradients_of(short("gpt", source, **MODES[mode]), tmp_path / "fused")
    plain = gradients_of(short("gpt", source, training__fused_loss=False, **MODES[mode]), tmp_path / "plain")
    assert losses_of(tmp_path / "fused") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-6)
    assert_same_gradients(fused, plain, rtol=1e-5)
    assert build_model(short("gpt", source)).fused_loss  # pyright: ignore[reportAttributeAccessIssue]


def test_carried_states_change_what_a_step_computes_behind_the_first(books: Path, tmp_path: Path) -> None:
    runs: dict[str, list[float]] = {}
    for name, changes in (("carried", {}), ("limited", {"data__carry_tokens": 1})):
        pretrain(short("gpt", books, **CARRIED, **changes), output_dir=tmp_path / name)
        runs[name] = losses_of(tmp_path / name)
    assert runs["carried"][0] == runs["limited"][0], "both start from zero"
    # The first update has a rate of 0, so the second step differs in nothing but the states.
    assert runs["carried"][1] != pytest.approx(runs["limited"][1], rel=1e-6)
    line = next(entry for entry in metrics_of(tmp_path / "carried") if "val_loss" in entry)
    assert line["val_reset_loss"] != pytest.approx(line["val_loss"], rel=1e-6)


def test_states_are_carried_after_the_steps_asked_for(books: Path, tmp_path: Path) -> None:
    for name, changes in (("afresh", {"data__carry_tokens": 1}), ("later", {})):
        recipe = short("gpt", books, **CARRIED, data__carry_after=2, training__max_steps=5, **changes)
        pretrain(recipe, output_dir=tmp_path / name)
    afresh, later = losses_of(tmp_path / "afresh"), losses_of(tmp_path / "later")
    assert afresh[:3] == later[:3], "the first step in lanes starts from zero as well"
    assert afresh[3] != pytest.approx(later[3], rel=1e-6)


@pytest.mark.slow
def test_a_carried_run_killed_in_a_document_ends_like_one_that_never_was(books: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("gpt", books, **CARRIED, data__carry_lanes=16, data__carry_after=4)
    pretrain(recipe, output_dir=tmp_path / "whole")
    steps_per_pass = len(prepare_text(recipe, None).train) // 16 * 2
    assert 6 < steps_per_pass < recipe.training.max_steps, "step 6 is inside a pass, and there are several"
    for moment, count, exit_code, checkpoints in (
        ("a micro batch is done", 26, KILLED, [3, 6]),
        ("SIGTERM comes", 5, 128 + signal.SIGTERM, [6, 8]),
        (None, 1, 0, [18, 20]),
    ):
        assert in_child(victims.run, recipe, tmp_path / "run", moment, count) == exit_code, moment
        assert steps_of(tmp_path / "run") == checkpoints, moment
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    states = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-20" / "carried_states.safetensors")
    assert states["seen"].shape == (16,)
    assert int(states["seen"].max()) >= 2 * recipe.data.sequence_length, "documents go on over windows"
    assert states["layers.1.kv"].shape == (16, 2, 8, 8)


def test_a_document_run_goes_on_exactly(corpus: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("gpt", corpus, data__mode="document", training__max_steps=9)
    pretrain(recipe, output_dir=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-9")
    assert steps_of(tmp_path / "run") == [6]
    pretrain(recipe, output_dir=tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_finished_model_has_a_card_with_the_runs_figures(books: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("gpt", books, **CARRIED, training__max_steps=4)
    pretrain(recipe, output_dir=tmp_path / "my-run")
    card = (tmp_path / "my-run" / "model" / "README.md").read_text(encoding="utf-8")
    lines = metrics_of(tmp_path / "my-run")
    figures = {**next(line for line in reversed(lines) if "loss" in line), **lines[-1]}
    for name in ("loss", "val_loss", "val_reset_loss", "val_ppl"):
        assert f"| {name} | {figures[name]:.6g} |" in card
    assert card.count("# my-run") == 1
    assert f"Measured on {books.name}, 0.1 of the documents." in card
    assert "carry_state: true" in card


@pytest.mark.parametrize("mode", ["carried", pytest.param("document", marks=pytest.mark.slow)])
def test_bf16_stays_near_fp32(mode: str, corpus: Path, books: Path, tmp_path: Path) -> None:
    source = source_of(mode, corpus, books)
    for precision in ("fp32", "bf16"):
        recipe = short("gpt", source, training__precision=precision, training__max_steps=8, **MODES[mode])
        pretrain(recipe, output_dir=tmp_path / precision)
    full, half = losses_of(tmp_path / "fp32"), losses_of(tmp_path / "bf16")
    assert half != full
    assert half == pytest.approx(full, rel=5e-3)  # bf16 has 8 bits: 4e-3 a value


def test_documents_with_recomputed_activations_give_the_same_run(corpus: Path, tmp_path: Path) -> None:
    changes = {"model__dropout": 0.2, "data__mode": "document"}
    plain = gradients_of(short("gpt", corpus, **changes), tmp_path / "plain")
    changes["training__gradient_checkpointing"] = True
    assert_same_gradients(gradients_of(short("gpt", corpus, **changes), tmp_path / "again"), plain, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # likewise
def test_a_compiled_model_trains_the_same_on_documents(corpus: Path, tmp_path: Path) -> None:
    plain = gradients_of(short("gpt", corpus, data__mode="document"), tmp_path / "plain")
    compiled = gradients_of(short("gpt", corpus, data__mode="document", training__compile=True), tmp_path / "compiled")
    assert_same_gradients(compiled, plain, rtol=1e-5)
    assert losses_of(tmp_path / "compiled") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__carry_state": True, "model__attention_type": "softmax"},
            "data.carry_state needs model.attention_type: cosine, whose state has a constant size; got softmax",
        ),
        (
            {"data__carry_state": True, "data__mode": "document"},
            "data.carry_state needs data.mode: packed; got document",
        ),
        ({"data__carry_tokens": 64}, "data.carry_tokens needs data.carry_state: true; got false"),
        ({"data__carry_lanes": 64}, "data.carry_lanes needs data.carry_state: true; got false"),
        (
            {"data__carry_state": True, "data__carry_lanes": 12},
            "data.carry_lanes must be a multiple of training.global_batch_size, whose windows take turns; got 12 and 8",
        ),
        (
            {"data__carry_state": True, "training__gradient_checkpointing": True},
            "data.carry_state excludes training.gradient_checkpointing; got both",
        ),
        (
            {"data__carry_state": True, "data__carry_after": 20},
            "data.carry_after must be less than training.max_steps; got 20 and 20",
        ),
        ({"data__carry_after": 0.5}, "data.carry_after needs data.carry_state: true; got false"),
        (
            {"data__carry_state": True, "training__compile": True},
            "data.carry_state excludes training.compile; got both",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_named(changes: dict[str, Any], message: str, corpus: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        tiny_recipe("gpt", corpus, **changes)
    assert str(caught.value) == message


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"data\.carry_tokens must be positive; got 0"):
        GPTDataSettings(carry_state=True, carry_tokens=0)
