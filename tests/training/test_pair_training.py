"""Training on sentence pairs: both losses, both lengths, packed as padded, and a stopped run goes on exactly."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cottention.errors import CottentionError, DataError, SettingsError
from cottention.models import CottentionBertForPreTraining
from cottention.models.bert.modeling_bert import CottentionBertForPreTrainingOutput
from cottention.training.pretraining import build_model, pretrain
from cottention.training.stream import PassCollator, PhasedStream
from cottention.training.text import prepare_text
from tests.training import victims
from tests.training.helpers import assert_same_run, in_child, metrics_of, steps_of, tiny_recipe, weights_of
from tests.training.test_trainer import assert_same_gradients, gradients_of, losses_of

SEED = 3


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of paragraphs of several sentences."""
    source = random.Random(0)
    words = ["".join(source.choices("abcdefghijklmnoprstuvw", k=source.randint(2, 7))) for _ in range(60)]
    paragraphs = []
    for _ in range(60):
        sentences = [" ".join(source.choices(words, k=source.randint(4, 9))) for _ in range(source.randint(4, 9))]
        paragraphs.append(" ".join(f"{sentence.capitalize()}." for sentence in sentences))
    path = tmp_path_factory.mktemp("stories") / "text.txt"
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


def pair_recipe(source: Path, **changes: Any) -> Any:
    """A run of 20 steps, the last 6 at 64 tokens instead of 32."""
    settings = {
        "model__next_sentence_head": True,
        "model__max_position_embeddings": 64,
        "data__next_sentence": True,
        "data__long_sequence_length": 64,
        "data__long_fraction": 0.3,
    }
    return tiny_recipe("bert", source, **{**settings, **changes})


def three_steps(source: Path, **changes: Any) -> Any:
    """Two short steps and a long one, all logged, without dropout."""
    settings = {"model__dropout": 0.0, "training__max_steps": 3, "training__log_every": 1, **changes}
    return pair_recipe(source, **settings)


def _batches_of(recipe: Any) -> list[dict[str, Any]]:
    """One batch of each step."""
    text = prepare_text(recipe, None)
    stream = text.stream(recipe)
    size = recipe.training.global_batch_size
    return [text.collator(stream.__getitems__(list(range(i, i + size)))) for i in range(0, len(stream), size)]


# Phases


def test_a_run_has_its_long_examples_at_its_end(stories: Path) -> None:
    recipe = pair_recipe(stories)
    text = prepare_text(recipe, None)
    stream, collate = text.stream(recipe), text.training_collator(recipe)
    assert isinstance(stream, PhasedStream)
    assert len(stream) == 20 * 8
    assert text.long is not None
    assert recipe.num_long_steps == 6
    longest = []
    for start in range(0, len(stream), 2):
        batch = collate(stream.__getitems__([start, start + 1]))
        passes = batch.get("passes", [batch])
        assert len(passes) == (1 if start < 14 * 8 else 2)
        assert sum(len(one["next_sentence_label"]) for one in passes) == 2
        assert all(one["input_ids"].shape[1] <= 2 * 32 for one in passes), "as many tokens a pass as before"
        longest.append(max(int(one["cu_seqlens"].diff().max()) for one in passes))
    assert max(longest[: 14 * 4]) <= 32 < max(longest[14 * 4 :])
    rows = [stream[position]["row"] for position in range(14 * 8, 20 * 8)]
    assert rows == [text.stream(recipe).streams[1].index_at(position) for position in range(6 * 8)]  # type: ignore[union-attr]
    assert recipe.tokens_after(14) == 14 * 8 * 32
    assert recipe.tokens_after(20) == 14 * 8 * 32 + 6 * 8 * 64
    assert text.epochs_after(20, recipe) == pytest.approx(14 * 8 / len(text.train) + 6 * 8 / len(text.long))


def test_windows_without_pairs_become_longer_too(stories: Path, tmp_path: Path) -> None:
    recipe = pair_recipe(stories, data__next_sentence=False, model__next_sentence_head=False)
    pretrain(recipe, output_dir=tmp_path / "run")
    last = metrics_of(tmp_path / "run")[-1]
    assert (last["step"], last["tokens"]) == (20, recipe.tokens_after(20))


def test_the_learning_rate_has_one_schedule_over_both_lengths(stories: Path, tmp_path: Path) -> None:
    pretrain(pair_recipe(stories), output_dir=tmp_path / "run")
    rates = {line["step"]: line["learning_rate"] for line in metrics_of(tmp_path / "run") if "loss" in line}
    assert {step: rates[step] for step in (10, 14, 16, 20)} == {
        step: pytest.approx(1e-2 * (20 - (step - 1)) / 16) for step in (10, 14, 16, 20)
    }


@pytest.mark.slow
def test_a_run_stopped_in_either_phase_goes_on_exactly(stories: Path, tmp_path: Path) -> None:
    """Dropout, accumulation and several passes over the text are on."""
    recipe = pair_recipe(stories, training__save_every=1, training__max_steps=12, data__long_fraction=0.5)
    pretrain(recipe, output_dir=tmp_path / "whole")
    stopped = tmp_path / "stopped"
    # In the short part, after its last step (the long part begins with the next), and inside the long part.
    for moment, count, checkpoints in [
        ("an update is done", 4, [2, 3]),
        ("SIGTERM comes", 9, [5, 6]),
        ("a micro batch is done", 10, [7, 8]),
        (None, 1, [11, 12]),
    ]:
        in_child(victims.run, recipe, stopped, moment, count)
        assert steps_of(stopped) == checkpoints, moment
    assert_same_run(stopped, tmp_path / "whole")


# The step


@pytest.mark.parametrize("attention_type", ["cosine", pytest.param("softmax", marks=pytest.mark.slow)])
def test_packed_pairs_give_the_loss_and_gradients_of_padded_ones(
    attention_type: str, stories: Path, tmp_path: Path
) -> None:
    runs = {}
    for unpadded in (True, False):
        recipe = three_steps(stories, training__unpadded=unpadded, model__attention_type=attention_type)
        runs[unpadded] = gradients_of(recipe, tmp_path / str(unpadded))
    for name in ("loss", "mlm_loss", "nsp_loss"):
        packed, padded = (
            [line[name] for line in metrics_of(tmp_path / str(unpadded)) if name in line] for unpadded in (True, False)
        )
        assert packed == pytest.approx(padded, rel=1e-6)
    assert_same_gradients(runs[True], runs[False], rtol=1e-5)


def test_hidden_positions_alone_give_the_loss_and_gradients_of_all(stories: Path, tmp_path: Path) -> None:
    runs = {
        sparse: gradients_of(three_steps(stories, model__sparse_prediction=sparse), tmp_path / str(sparse))
        for sparse in (True, False)
    }
    assert losses_of(tmp_path / "True") == pytest.approx(losses_of(tmp_path / "False"), rel=1e-6)
    assert_same_gradients(runs[True], runs[False], rtol=1e-5)


def test_micro_batches_give_the_losses_and_gradients_of_one_batch(stories: Path, tmp_path: Path) -> None:
    """Each loss is scaled by its own count of the whole step, in both phases.

    With this seed no step has as many strangers as true pairs: at the start, where all are scored alike, the
    gradients of four and four cancel to what rounding leaves.
    """
    for batch in _batches_of(three_steps(stories, training__seed=SEED)):
        assert int(batch["next_sentence_label"].sum()) != 4
    whole = gradients_of(three_steps(stories, training__seed=SEED, training__micro_batch_size=8), tmp_path / "8")
    parts = gradients_of(three_steps(stories, training__seed=SEED, training__micro_batch_size=2), tmp_path / "2")
    for name in ("mlm_loss", "nsp_loss"):
        one, many = ([line[name] for line in metrics_of(tmp_path / n) if name in line] for n in ("8", "2"))
        assert many == pytest.approx(one, rel=1e-6)
    assert_same_gradients(parts, whole, rtol=1e-5)


def test_the_logged_losses_are_the_means_over_their_own_targets(stories: Path, tmp_path: Path) -> None:
    """Before the first update, whose rate is 0, the model is known: the losses can be computed by hand."""
    recipe = three_steps(stories, training__max_steps=1, data__long_sequence_length=None)
    pretrain(recipe, output_dir=tmp_path / "run")
    model = CottentionBertForPreTraining.from_pretrained(tmp_path / "run" / "model").double().eval()
    text = prepare_text(recipe, tmp_path / "run")
    nats, nsp_nats, num_targets = 0.0, 0.0, 0
    for row in text.stream(recipe).__getitems__(list(range(8))):
        batch = text.collator([row])
        labels = batch.pop("labels")[0]
        label = int(batch.pop("next_sentence_label"))
        outputs = model(**batch)
        nsp_nats -= outputs.seq_relationship_logits[0].log_softmax(-1)[label].item()
        for position in (labels != -100).nonzero().flatten().tolist():
            scores = outputs.prediction_logits[0, position].log_softmax(-1)
            nats -= scores[labels[position]].item()
            num_targets += 1
    line = metrics_of(tmp_path / "run")[0]
    assert line["mlm_loss"] == pytest.approx(nats / num_targets, rel=1e-6)
    assert line["nsp_loss"] == pytest.approx(nsp_nats / 8, rel=1e-6)
    assert line["loss"] == pytest.approx(line["mlm_loss"] + line["nsp_loss"], rel=1e-6)


def test_both_heads_learn(stories: Path, tmp_path: Path) -> None:
    recipe = three_steps(stories)
    first = gradients_of(recipe, tmp_path / "run")[0]
    num_parameters = len(list(CottentionBertForPreTraining.from_pretrained(tmp_path / "run" / "model").parameters()))
    assert len(first) == num_parameters, "every parameter has a gradient"
    weights = weights_of(tmp_path / "run" / "model")
    assert float(weights["cls.seq_relationship.bias"].abs().max()) > 0


def test_bf16_trains_on_pairs(stories: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        pretrain(three_steps(stories, training__precision=precision), output_dir=tmp_path / precision)
    full, half = losses_of(tmp_path / "fp32"), losses_of(tmp_path / "bf16")
    assert full != half
    assert half == pytest.approx(full, rel=5e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # and looks at that between graphs
@pytest.mark.parametrize("attention_type", ["cosine", "softmax"])
def test_a_compiled_model_trains_the_same_on_packed_pairs(attention_type: str, stories: Path, tmp_path: Path) -> None:
    changes = {"model__attention_type": attention_type, "training__seed": SEED}
    plain = gradients_of(three_steps(stories, **changes), tmp_path / "plain")
    compiled = gradients_of(three_steps(stories, training__compile=True, **changes), tmp_path / "compiled")
    assert_same_gradients(compiled, plain, rtol=1e-5)
    assert losses_of(tmp_path / "compiled") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-6)


# Held out


def test_the_held_out_figures_are_those_of_a_count_by_hand(stories: Path) -> None:
    recipe = pair_recipe(stories, data__validation=0.5, data__eval_tokens=5000)
    text = prepare_text(recipe, None)
    torch.manual_seed(1)
    model = build_model(recipe, text.tokenizer).double().eval()
    measure: Any = text.held_out
    found = measure.measure(model, {"device_type": "cpu", "enabled": False})
    windows, collator = measure._windows, measure._collator
    counts: dict[str, list[float]] = {
        name: [] for name in ("all", "hidden", "kept", "nsp", "nats", "hidden_nats", "nsp_nats")
    }
    for row in range(len(windows)):
        batch = collator([windows[row]])
        outputs = model(**{name: value for name, value in batch.items() if "label" not in name})
        answer = int(batch["next_sentence_label"])
        scores = outputs.seq_relationship_logits[0].log_softmax(-1)
        counts["nsp"].append(float(scores.argmax() == answer))
        counts["nsp_nats"].append(-scores[answer].item())
        for position, target in enumerate(batch["labels"][0].tolist()):
            if target == -100:
                continue
            scores = outputs.prediction_logits[0, position].log_softmax(-1)
            right, nats = float(scores.argmax() == target), -scores[target].item()
            hidden = int(batch["input_ids"][0, position]) != target
            counts["all"].append(right)
            counts["nats"].append(nats)
            counts["hidden" if hidden else "kept"].append(right)
            if hidden:
                counts["hidden_nats"].append(nats)
    means = {name: float(np.mean(values)) for name, values in counts.items()}
    assert len(counts["kept"]) > 5
    assert found == {
        "val_loss": pytest.approx(means["nats"] + means["nsp_nats"]),
        "val_ppl": pytest.approx(math.exp(means["nats"])),
        "val_accuracy": pytest.approx(means["all"]),
        "val_mlm_loss": pytest.approx(means["nats"]),
        "val_mlm_accuracy": pytest.approx(means["hidden"]),
        "val_hidden_loss": pytest.approx(means["hidden_nats"]),
        "val_kept_accuracy": pytest.approx(means["kept"]),
        "val_nsp_loss": pytest.approx(means["nsp_nats"]),
        "val_nsp_accuracy": pytest.approx(means["nsp"]),
    }


def test_copying_is_no_skill(stories: Path) -> None:
    """A model that says what it sees is right on the kept tokens and nowhere else."""
    recipe = pair_recipe(stories, data__validation=0.5, data__eval_tokens=5000)
    text = prepare_text(recipe, None)

    class Copies(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: Any, labels: Any, next_sentence_label: Any, **_others: Any) -> Any:
            shown = input_ids[labels != -100]
            scores = torch.nn.functional.one_hot(shown, recipe.model.vocab_size).double() * 9
            return CottentionBertForPreTrainingOutput(
                prediction_logits=scores,
                seq_relationship_logits=torch.zeros(len(next_sentence_label), 2).double(),
            )

    measure: Any = text.held_out
    found = measure.measure(Copies(), {"device_type": "cpu", "enabled": False})  # type: ignore[arg-type]
    assert (found["val_mlm_accuracy"], found["val_kept_accuracy"]) == (0.0, 1.0)
    assert found["val_accuracy"] > 0.05
    assert found["val_hidden_loss"] > found["val_mlm_loss"]


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__next_sentence_head": False}, "data.next_sentence needs model.next_sentence_head: true; got false"),
        ({"data__long_sequence_length": 48}, "long_sequence_length must be a multiple of data.sequence_length; got 48"),
        ({"data__long_sequence_length": 32}, "long_sequence_length must be a multiple of data.sequence_length; got 32"),
        ({"data__long_fraction": 0.0}, "data.long_fraction must be between 0 and 1; got 0.0"),
        (
            {"data__long_sequence_length": 128},
            "data.long_sequence_length must not exceed model.max_position_embeddings",
        ),
        ({"training__micro_batch_size": 1}, "micro_batch_size must be a multiple of .* = 2; got 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, stories: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        pair_recipe(stories, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__split_by": "document"}, "the corpus is one document, of which nothing can be held out"),
        ({"data__whole_word_masking": True, "data__tokenizer": "BPE"}, "the tokenizer has no cls_token, sep_token"),
    ],
)
def test_text_that_gives_no_pairs_is_refused(
    changes: dict[str, Any], message: str, stories: Path, finished_gpt: Any
) -> None:
    if changes.get("data__tokenizer") == "BPE":
        changes = {**changes, "data__tokenizer": str(finished_gpt.directory / "tokenizer")}
    with pytest.raises(CottentionError, match=message) as error:
        prepare_text(pair_recipe(stories, **changes), None)
    assert "\n" not in str(error.value)


def test_two_documents_are_too_few_to_hold_some_out(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("One is here. Two is here.\n\nThree is here. Four is here.\n")
    with pytest.raises(DataError, match="the corpus is 2 documents, of which no two can be held out"):
        prepare_text(pair_recipe(tmp_path / "text.txt"), None)


def test_held_out_text_of_one_document_is_refused(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("One is here. Two is here. Three is here.")
    with pytest.raises(DataError, match="the held-out text is one document, so no sentence of another can follow"):
        prepare_text(pair_recipe(stories, data__validation=str(tmp_path / "held.txt")), None)


def test_a_pass_collator_leaves_short_batches_alone() -> None:
    collate = PassCollator(lambda rows: {"rows": [row["n"] for row in rows]}, [1, 2])
    assert collate([{"n": 1, "phase": 0}, {"n": 2, "phase": 0}]) == {"rows": [1, 2]}
    assert collate([{"n": n, "phase": 1} for n in range(4)]) == {"passes": [{"rows": [0, 1]}, {"rows": [2, 3]}]}
