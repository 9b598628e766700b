"""Fine-tuning: all nine tasks end to end, seeds, the best epoch, resuming to the same weights, and clear mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, TrainerCallback, pipeline

from cottention.data.glue import load_glue
from cottention.data.glue_batches import GlueCollator, encode_glue
from cottention.data.glue_tasks import GLUE_TASKS, glue_task
from cottention.errors import CheckpointError, CottentionError, DataError, SettingsError
from cottention.evaluation.glue import glue_logits, glue_scores, predictions_of
from cottention.generation import load_model_and_tokenizer
from cottention.models import CottentionBertForPreTraining
from cottention.training.checkpointing_trainer import NonFiniteLossError
from cottention.training.finetune_settings import FinetuneSettings
from cottention.training.finetune_trainer import FinetuneTrainer
from cottention.training.finetuning import FinetuneResult, build_classifier, finetune
from tests import tiny
from tests.glue_files import FOLDERS, write_glue, write_split
from tests.models.helpers import bert_config
from tests.training.helpers import in_child, weights_of

SETTINGS = FinetuneSettings(batch_size=8, epochs=3, max_length=32, learning_rate=2e-3)


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"), num_rows=20)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def save_bert(folder: Path, **settings: Any) -> Path:
    """A BERT with dropout, so that what a resumed run forgets shows."""
    torch.manual_seed(0)
    tokenizer = tiny.wordpiece_tokenizer()
    config = bert_config(**{"vocab_size": len(tokenizer), "hidden_dropout_prob": 0.1, **settings})
    return tiny.save(folder, CottentionBertForPreTraining(config), tokenizer)


def run(pretrained: Path, glue: Path, output: Path, task: str = "rte", **changes: Any) -> FinetuneResult:
    options = {"settings": SETTINGS, **changes}
    return finetune(pretrained, task=task, data=glue, output_dir=output, **options)


@pytest.mark.parametrize("task", GLUE_TASKS)
@pytest.mark.slow
def test_every_task_end_to_end(task: str, pretrained: Path, glue: Path, tmp_path: Path) -> None:
    result = run(pretrained, glue, tmp_path, task)
    assert result.metrics == json.loads((tmp_path / task / "metrics.json").read_text())
    (seed,) = result.metrics["seeds"]
    assert [entry["epoch"] for entry in seed["epochs"]] == [1, 2, 3]
    assert [entry["step"] for entry in seed["epochs"]] == [3, 5, 8]  # 20 rows, batches of 8
    best = seed["epochs"][seed["best_epoch"] - 1]
    assert best["score"] == max(entry["score"] for entry in seed["epochs"])
    assert result.metrics["best"] == {"seed": 0, "epoch": seed["best_epoch"], "score": best["score"]}
    assert result.metrics["absent"] == []
    assert sorted(path.name for path in (tmp_path / task).iterdir()) == ["metrics.json", "model", "settings.yaml"]
    # The saved model is the best epoch's, and gives the scores that were written down.
    model, tokenizer = load_model_and_tokenizer(tmp_path / task / "model", "classifier")
    chosen = glue_task(task)
    for split, scores in best["splits"].items():
        rows = encode_glue(load_glue(chosen, glue, split), tokenizer, SETTINGS.max_length).rows
        logits = glue_logits(model, rows, GlueCollator(pad_token_id=0, packed=False))
        again = glue_scores(chosen, predictions_of(chosen, logits), np.asarray(rows["label"]))
        assert again.official == pytest.approx(scores["official"], abs=1e-5)
        assert again.as_published == pytest.approx(scores["as_published"], abs=1e-5)
    assert model.config.problem_type == ("regression" if task == "stsb" else "single_label_classification")
    if task != "stsb":
        assert model.config.id2label == dict(enumerate(chosen.classes))


@pytest.mark.slow
@pytest.mark.parametrize("task", GLUE_TASKS)
def test_every_task_on_its_real_files(task: str, pretrained: Path, shared_dir: Path, tmp_path: Path) -> None:
    data = shared_dir / "data/glue"
    if not data.is_dir():
        pytest.skip("needs GLUE's files in shared/data/glue")
    settings = FinetuneSettings(batch_size=8, epochs=1, max_length=48, train_limit=40, dev_limit=30)
    result = run(pretrained, data, tmp_path, task, settings=settings)
    splits = result.metrics["seeds"][0]["epochs"][0]["splits"]
    assert list(splits) == [glue_task(task).dev_splits[0]]
    assert result.metrics["absent"] == (["dev_mismatched"] if task == "mnli" else [])
    assert result.metrics["num_rows"] == {"train": 40, glue_task(task).dev_splits[0]: 30}


def test_a_learnable_task_is_learned(tmp_path: Path) -> None:
    assert _learned("sst2", tmp_path, epochs=4)["score"] > 0.95


def test_the_loss_of_scores_compares_each_with_its_own(tmp_path: Path) -> None:
    """A loss that compares all with all, as the published one does for STS-B, stays at the scores' variance of 3.7."""
    last = _learned("stsb", tmp_path, epochs=6)
    assert last["train_loss"] < 2
    assert last["score"] > 0.7


def _learned(task: str, folder: Path, epochs: int) -> dict[str, Any]:
    """The last epoch on enough rows to learn from."""
    data = write_glue(folder / "glue", num_rows=160, tests=False)
    bert = save_bert(folder / "bert", hidden_dropout_prob=0.0)
    settings = FinetuneSettings(batch_size=8, epochs=epochs, max_length=32, learning_rate=3e-3)
    return run(bert, data, folder, task, settings=settings).metrics["seeds"][0]["epochs"][-1]


def test_the_best_of_several_seeds_is_kept_and_seeds_can_be_added(pretrained: Path, glue: Path, tmp_path: Path) -> None:
    both = run(pretrained, glue, tmp_path / "both", seeds=[1, 2])
    run(pretrained, glue, tmp_path / "added", seeds=[1])
    added = run(pretrained, glue, tmp_path / "added", seeds=[1, 2])
    assert added.metrics == both.metrics
    assert [entry["seed"] for entry in both.metrics["seeds"]] == [1, 2]
    first, second = both.metrics["seeds"]
    assert first["epochs"] != second["epochs"]
    best = [seed["epochs"][seed["best_epoch"] - 1]["score"] for seed in (first, second)]
    assert both.metrics["best"]["seed"] == 1 + int(np.argmax(best))
    for name, weight in weights_of(tmp_path / "both/rte/model").items():
        assert torch.equal(weight, weights_of(tmp_path / "added/rte/model")[name]), name


def test_the_first_of_equally_good_epochs_is_kept() -> None:
    trainer = object.__new__(FinetuneTrainer)
    trainer.epochs = []
    assert trainer.best_epoch is None
    trainer.epochs = [{"score": score} for score in (0.1, 0.5, 0.5, 0.4)]
    assert trainer.best_epoch == 2


class _StopAfter(TrainerCallback):
    """Sends SIGTERM, or dies, after a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_end(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def _stopped(pretrained: Path, glue: Path, output: Path, step: int, number: int) -> FinetuneResult:
    before = FinetuneTrainer.fit

    def fit(self: FinetuneTrainer) -> None:
        self.add_callback(_StopAfter(step, number))
        before(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FinetuneTrainer, "fit", fit)
        return run(pretrained, glue, output, seeds=[3])


@pytest.mark.parametrize("step", [1, 4])
def test_a_stopped_run_goes_on_to_the_same_model(step: int, pretrained: Path, glue: Path, tmp_path: Path) -> None:
    expected = run(pretrained, glue, tmp_path / "whole", seeds=[3])
    stopped = _stopped(pretrained, glue, tmp_path / "stopped", step, signal.SIGTERM)
    assert stopped.exit_code == 128 + signal.SIGTERM
    assert stopped.model_dir is None
    resumed = run(pretrained, glue, tmp_path / "stopped", seeds=[3])
    assert resumed.exit_code == 0
    assert resumed.metrics == expected.metrics
    _assert_same_weights(tmp_path / "stopped/rte/model", tmp_path / "whole/rte/model")


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 6, 8])
def test_a_killed_run_goes_on_to_the_same_model(step: int, pretrained: Path, glue: Path, tmp_path: Path) -> None:
    expected = run(pretrained, glue, tmp_path / "whole", seeds=[3])
    assert in_child(_stopped, pretrained, glue, tmp_path / "killed", step, signal.SIGKILL) == -signal.SIGKILL
    assert run(pretrained, glue, tmp_path / "killed", seeds=[3]).metrics == expected.metrics
    _assert_same_weights(tmp_path / "killed/rte/model", tmp_path / "whole/rte/model")


def test_a_seed_that_was_done_but_not_taken_in(
    pretrained: Path, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(pretrained, glue, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", lambda *_args, **_options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(pretrained, glue, tmp_path / "killed")
    assert not (tmp_path / "killed/rte/metrics.json").exists()
    assert run(pretrained, glue, tmp_path / "killed").metrics == expected.metrics
    _assert_same_weights(tmp_path / "killed/rte/model", tmp_path / "whole/rte/model")


def _assert_same_weights(got: Path, expected: Path) -> None:
    weights, truth = weights_of(got), weights_of(expected)
    assert weights.keys() == truth.keys()
    assert not [name for name in truth if not torch.equal(weights[name], truth[name])]


def test_a_classifier_starts_from_the_pretrained_weights(pretrained: Path) -> None:
    truth = weights_of(pretrained)
    model = build_classifier(pretrained, glue_task("mnli"), seed=1)
    for name, weight in model.bert.state_dict().items():
        assert torch.equal(weight, truth[f"bert.{name}"]), name
    assert model.classifier.weight.shape[0] == 3
    heads = [build_classifier(pretrained, glue_task("mnli"), seed=seed).classifier.weight for seed in (1, 2)]
    assert torch.equal(model.classifier.weight, heads[0])
    assert not torch.equal(heads[0], heads[1])


def test_from_scratch_takes_the_shape_alone(pretrained: Path, glue: Path, tmp_path: Path) -> None:
    truth = weights_of(pretrained)["bert.encoder.layer.0.attention.self.query.weight"]
    models: list[Any] = [
        build_classifier(pretrained, glue_task("rte"), seed=seed, from_scratch=True) for seed in (1, 1, 2)
    ]
    queries = [model.bert.encoder.layer[0].attention.self.query.weight for model in models]
    assert torch.equal(queries[0], queries[1])
    assert not torch.equal(queries[0], queries[2])
    assert not torch.equal(queries[0], truth)
    settings = FinetuneSettings(batch_size=8, epochs=1, max_length=32, from_scratch=True)
    assert run(pretrained, glue, tmp_path, settings=settings).metrics["from_scratch"] is True


def test_a_fine_tuned_model_can_start_another_task(pretrained: Path, glue: Path, tmp_path: Path) -> None:
    first = run(pretrained, glue, tmp_path, "mnli").model_dir
    assert first is not None
    second = run(first, glue, tmp_path, "rte")
    assert second.model_dir is not None
    assert weights_of(second.model_dir)["classifier.weight"].shape[0] == 2


def test_limits_take_the_same_rows_for_every_seed(pretrained: Path, glue: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(batch_size=8, epochs=1, max_length=32, train_limit=7, dev_limit=5)
    result = run(pretrained, glue, tmp_path, settings=settings, seeds=[1, 2])
    assert result.metrics["num_rows"] == {"train": 7, "dev": 5}
    assert [entry["epochs"][0]["step"] for entry in result.metrics["seeds"]] == [1, 1]


def test_fewer_rows_than_a_batch_still_make_epochs(pretrained: Path, glue: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(batch_size=64, epochs=3, max_length=32)
    epochs = run(pretrained, glue, tmp_path, settings=settings).metrics["seeds"][0]["epochs"]
    assert [(entry["epoch"], entry["step"]) for entry in epochs] == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_the_learning_rate(schedule: Any) -> None:
    settings = FinetuneSettings(schedule=schedule, warmup=0.2)
    factors = [settings.learning_rate_factor(step, 10) for step in range(10)]
    falling = [1 - step / 8 for step in range(8)]
    assert factors == pytest.approx([1 / 3, 2 / 3, *([1.0] * 8 if schedule == "constant" else falling)])
    assert FinetuneSettings().learning_rate_factor(0, 10) == 1  # the published rate is there from the first step on


def test_bf16_trains_and_keeps_float32_weights(pretrained: Path, glue: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(batch_size=8, epochs=1, max_length=32, precision="bf16")
    result = run(pretrained, glue, tmp_path / "bf16", settings=settings)
    assert result.model_dir is not None
    assert {weight.dtype for weight in weights_of(result.model_dir).values()} == {torch.float32}
    exact = run(pretrained, glue, tmp_path / "fp32", settings=FinetuneSettings(batch_size=8, epochs=1, max_length=32))
    losses = [each.metrics["seeds"][0]["epochs"][0]["train_loss"] for each in (result, exact)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_long_rows_are_counted(pretrained: Path, glue: Path, tmp_path: Path, log_lines: list[str]) -> None:
    settings = FinetuneSettings(batch_size=8, epochs=1, max_length=12)
    num_cut = run(pretrained, glue, tmp_path, settings=settings).metrics["num_cut"]
    assert 0 < num_cut["train"] <= 20
    assert f"RTE train: {num_cut['train']} of 20 rows are longer than 12 tokens and were cut" in log_lines


def test_missing_mismatched_rows_are_reported(pretrained: Path, tmp_path: Path, log_lines: list[str]) -> None:
    folder = tmp_path / "MNLI"
    folder.mkdir()
    for split in ("train", "dev_matched"):
        write_split(folder / f"{split}.tsv", "MNLI", 8)
    assert run(pretrained, tmp_path, tmp_path / "out", "mnli").metrics["absent"] == ["dev_mismatched"]
    assert f"MNLI: dev_mismatched is absent from {tmp_path}, so it is not measured" in log_lines


def test_the_model_opens_in_a_pipeline(pretrained: Path, glue: Path, tmp_path: Path) -> None:
    model_dir = run(pretrained, glue, tmp_path).model_dir
    assert model_dir is not None
    AutoModelForSequenceClassification.from_pretrained(model_dir)
    (found,) = pipeline("text-classification", model=str(model_dir))("the people")  # pyright: ignore
    assert found["label"] in ("entailment", "not_entailment")  # pyright: ignore


# Mistakes


def mistake(kind: type[CottentionError], *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        run(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_settings_in_the_same_place(pretrained: Path, glue: Path, tmp_path: Path) -> None:
    run(pretrained, glue, tmp_path)
    changed = FinetuneSettings(batch_size=8, epochs=2, max_length=32, learning_rate=2e-3)
    said = mistake(SettingsError, pretrained, glue, tmp_path, settings=changed)
    assert said == (
        f"{tmp_path / 'rte'} holds a run of other settings: epochs (3 there, 2 now); choose another --output-dir, "
        "or --overwrite to start again"
    )
    again = run(pretrained, glue, tmp_path, settings=changed, overwrite=True)
    assert len(again.metrics["seeds"][0]["epochs"]) == 2


def test_a_directory_with_something_else_is_left_alone(pretrained: Path, glue: Path, tmp_path: Path) -> None:
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte/thesis.tex").write_text("mine")
    said = mistake(SettingsError, pretrained, glue, tmp_path, overwrite=True)
    assert said == f"{tmp_path / 'rte'} is not empty and holds no settings.yaml; choose another --output-dir"
    assert (tmp_path / "rte/thesis.tex").read_text() == "mine"


def test_models_that_cannot_be_fine_tuned(pretrained: Path, glue: Path, tmp_path: Path) -> None:
    gpt = tiny.save(tmp_path / "gpt", tiny.gpt(dtype=torch.float32), tiny.bpe_tokenizer())
    said = mistake(CheckpointError, gpt, glue, tmp_path)
    assert said == f"{gpt} is a GPT, which generates text; needed is a BERT"
    assert not (tmp_path / "rte").exists()  # what comes next may have other settings
    empty = shutil.copytree(pretrained, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    assert mistake(CheckpointError, empty, glue, tmp_path / "1") == f"{empty} has no weights (model.safetensors)"
    other = shutil.copytree(pretrained, tmp_path / "other")
    tiny.bpe_tokenizer().save_pretrained(other)
    said = mistake(CheckpointError, other, glue, tmp_path / "2")
    assert said == f"{other} has a tokenizer of 290 tokens but {len(tiny.wordpiece_tokenizer())} embeddings"


def test_a_tokenizer_of_another_kind(glue: Path, tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "bert", vocab_size=300)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    tiny.bpe_tokenizer().save_pretrained(folder)
    said = mistake(SettingsError, folder, glue, tmp_path / "out")
    assert said == "the tokenizer must have [CLS] and [SEP], as a BERT's has; it has not"


def test_settings_that_make_no_sense(pretrained: Path, glue: Path, tmp_path: Path) -> None:
    long = FinetuneSettings(max_length=65)
    said = mistake(SettingsError, pretrained, glue, tmp_path, settings=long)
    assert said == "max_length must be at most the model's 64 positions; got 65"
    assert "task must be one of" in mistake(SettingsError, pretrained, glue, tmp_path, task="snli")
    said = "seeds must be different numbers from 0 up; got 1, 1"
    assert mistake(SettingsError, pretrained, glue, tmp_path, seeds=[1, 1]) == said
    for name, value in {"batch_size": 0, "epochs": 0, "learning_rate": float("nan"), "train_limit": 0}.items():
        with pytest.raises(SettingsError, match=f"^{name} must be positive; got {value}$"):
            FinetuneSettings(**{name: value})
    with pytest.raises(SettingsError, match=r"warmup must lie in \[0, 1\); got 1"):
        FinetuneSettings(warmup=1)


def test_rows_that_changed_in_between(pretrained: Path, tmp_path: Path) -> None:
    data = write_glue(tmp_path / "glue", tests=False)
    _stopped(pretrained, data, tmp_path / "out", 1, signal.SIGTERM)
    write_split(data / "RTE/train.tsv", "RTE", 16, seed=9)
    said = mistake(DataError, pretrained, data, tmp_path / "out", seeds=[3])
    assert "the rows are not those that" in said


def test_a_loss_that_is_no_number_stops_the_run(pretrained: Path, glue: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(batch_size=8, epochs=3, max_length=32, learning_rate=1e30)
    said = mistake(NonFiniteLossError, pretrained, glue, tmp_path, settings=settings)
    assert said.startswith("the loss became infinite or NaN at step ")
    assert "of RTE, seed 0; a smaller --learning-rate, a --warmup or --max-grad-norm may help" in said


def test_all_folders_have_a_task() -> None:
    assert [task.title for task in GLUE_TASKS.values()] == [
        "CoLA",
        "SST-2",
        "MRPC",
        "QQP",
        "STS-B",
        "MNLI",
        "QNLI",
        "RTE",
        "WNLI",
    ]
    assert sorted(FOLDERS) == sorted(task.title for task in GLUE_TASKS.values())
