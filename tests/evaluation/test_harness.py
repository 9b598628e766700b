"""lm-evaluation-harness on a local file finds what our own perplexity code finds on the same text."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from cottention.cli.main import main
from cottention.errors import CottentionError, DataError
from cottention.evaluation import HarnessResult, evaluate_harness, evaluate_perplexity
from tests import tiny
from tests.models.helpers import ATTENTION_TYPES

TaskManager = pytest.importorskip(
    "lm_eval.tasks", reason="needs lm-eval: pip install 'cottention[harness]'"
).TaskManager

PASSAGES = [
    "The people of the United States, in order to form a more perfect Union.",
    "the people of the United people",
    "A café in 東京 serves tea to the people",
    "Order the tea",
]
LAMBADA = """
task: lambada_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
WHOLE = """
task: text_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: byte_perplexity}}
"""
WRITE = """
task: write_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: 6, until: ["@@"], do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def task_folder(folder: Path, rows: list[dict[str, str]], *tasks: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    for number, task in enumerate(tasks):
        (folder / f"task{number}.yaml").write_text(task.format(file=folder / "rows.jsonl"), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return task_folder(tmp_path / "tasks", [{"text": text} for text in PASSAGES], LAMBADA, WHOLE)


def harness(model: Any, folder: Path, *tasks: str, **settings: Any) -> HarnessResult:
    return evaluate_harness(model, tiny.bpe_tokenizer(), tasks, include_path=folder, **settings)


def value_of(result: HarnessResult, metric: str) -> float:
    (score,) = (score for score in result.scores if score.metric == metric)
    return score.value


def nats(model: Any, text: str) -> float:
    """Our own score of a text without the end-of-text behind it: what a document comes to that is cut off."""
    cut_off = Dataset.from_dict({"text": [text], "ends_document": [False]})
    return evaluate_perplexity(model, tiny.bpe_tokenizer(), cut_off, context=64).nats


def is_likeliest(model: Any, context: str, target: str) -> bool:
    """Whether every token of the target is the likeliest one."""
    tokenizer = tiny.bpe_tokenizer()
    before, ids = [0, *tokenizer(context)["input_ids"]], tokenizer(target)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *ids]]), use_cache=False).logits[0]
    return logits[len(before) - 1 : -1].argmax(-1).tolist() == ids


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_lambada_file_scores_as_our_own_perplexity_does(folder: Path, attention_type: str, batch_size: int) -> None:
    model = tiny.gpt(attention_type, torch.float32)
    # So that some last word is the likeliest one.
    union = tiny.bpe_tokenizer()(" people")["input_ids"]
    with torch.no_grad():
        model.lm_head.bias[union] += 12.0
    result = harness(model, folder, "lambada_local", batch_size=batch_size)
    pairs = [(text.rpartition(" ")[0], text) for text in PASSAGES]
    target_nats = [nats(model, whole) - nats(model, context) for context, whole in pairs]
    right = [is_likeliest(model, context, whole[len(context) :]) for context, whole in pairs]
    assert 0 < sum(right) < len(right)
    mean = sum(target_nats) / len(target_nats)
    assert math.log(value_of(result, "perplexity")) == pytest.approx(mean, abs=1e-4)
    assert value_of(result, "acc") == pytest.approx(sum(right) / len(right))
    assert {(score.task, score.num_samples) for score in result.scores} == {("lambada_local", len(PASSAGES))}
    assert all(score.stderr is not None for score in result.scores)


def test_a_whole_text_scores_as_our_own_perplexity_does(folder: Path) -> None:
    model = tiny.gpt(dtype=torch.float32)
    result = harness(model, folder, "text_local")
    total = sum(nats(model, text) for text in PASSAGES)
    num_words, num_bytes = (
        sum(map(len, parts)) for parts in zip(*((t.split(), t.encode()) for t in PASSAGES), strict=True)
    )
    assert math.log(value_of(result, "word_perplexity")) == pytest.approx(total / num_words, abs=1e-4)
    assert math.log(value_of(result, "byte_perplexity")) == pytest.approx(total / num_bytes, abs=1e-4)


def test_a_cosine_model_reads_texts_beyond_its_window(tmp_path: Path) -> None:
    long = " ".join(["the people"] * 20)
    folder = task_folder(tmp_path / "tasks", [{"text": long}], WHOLE)
    model = tiny.gpt(dtype=torch.float32, n_positions=8)
    cut_off = Dataset.from_dict({"text": [long], "ends_document": [False]})
    for context in (8, 200):
        expected = evaluate_perplexity(model, tiny.bpe_tokenizer(), cut_off, context=200).nats / 40
        found = math.log(value_of(harness(model, folder, "text_local", context=context), "word_perplexity"))
        assert (found == pytest.approx(expected, abs=1e-4)) == (context == 200)
    with pytest.raises(CottentionError, match="a softmax model reads at most its 64 positions; got a context of 65"):
        harness(tiny.gpt("softmax"), folder, "text_local", context=65)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_answers_are_written_behind_an_end_of_text(tmp_path: Path, attention_type: str) -> None:
    model, tokenizer = tiny.gpt(attention_type, torch.float32), tiny.bpe_tokenizer()
    rows = []
    for prompt in ["The people of the", "A", "the people " * 12]:
        ids = [0, *tokenizer(prompt)["input_ids"][-57:]]  # room for 6 tokens in 64 positions
        out = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=1)
        rows.append({"prompt": prompt, "answer": str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))})
    folder = task_folder(tmp_path / "tasks", rows, WRITE)
    assert value_of(harness(model, folder, "write_local", batch_size=3), "exact_match") == 1.0
    rows[0]["answer"] += "!"
    folder = task_folder(tmp_path / "more", rows, WRITE)
    assert value_of(harness(model, folder, "write_local", batch_size=3), "exact_match") == pytest.approx(2 / 3)


def test_the_command_prints_a_table_or_json(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.gpt(dtype=torch.float32)
    directory = str(tiny.save(tmp_path / "gpt", model, tiny.bpe_tokenizer()))
    words = ["evaluate", "harness", "--model", directory, "--include-path", str(folder), "--limit", "2"]
    assert main([*words, "--tasks", "lambada_local,text_local", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = harness(model, folder, "lambada_local", "text_local", limit=2).to_dict()
    assert found == {"model": directory, **expected}
    assert main([*words, "--tasks", "lambada_local", "text_local"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "metric", "filter", "value", "stderr", "num_samples"]
    assert [line.split()[:2] for line in lines[1:]] == [[each["task"], each["metric"]] for each in expected["scores"]]


def test_an_unknown_task_is_one_line(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class LocalTasks(TaskManager):
        """Listing the thousands that come with lm-eval takes ten seconds."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**{**settings, "include_defaults": False})

    monkeypatch.setattr("lm_eval.tasks.TaskManager", LocalTasks)
    directory = str(tiny.save(tmp_path / "gpt", tiny.gpt(dtype=torch.float32), tiny.bpe_tokenizer()))
    words = ["evaluate", "harness", "--model", directory, "--include-path", str(folder), "--tasks", "lambda_local"]
    capsys.readouterr()
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "cottention evaluate: error: there is no task 'lambda_local'; did you mean 'lambada_local'?\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"limit": 0}, "limit must be at least 1; got 0"),
        ({"num_fewshot": -1}, "num_fewshot must be 0 or more; got -1"),
        ({"context": 1}, "context must be at least 2: end-of-text and a token; got 1"),
    ],
)
def test_a_number_that_makes_no_sense_is_one_line(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CottentionError) as caught:
        harness(tiny.gpt(), folder, "lambada_local", **settings)
    assert str(caught.value) == message


def test_a_folder_or_data_that_is_not_there_is_one_line(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CottentionError, match="include_path must be a folder; got"):
        harness(tiny.gpt(), tmp_path / "none", "lambada_local")
    (folder / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"the tasks lambada_local cannot be loaded: .*rows"):
        harness(tiny.gpt(), folder, "lambada_local")


def test_without_lm_eval_the_remedy_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(CottentionError) as caught:
        harness(tiny.gpt(), folder, "lambada_local")
    assert str(caught.value) == (
        "the harness needs lm-eval (lm_eval is missing); run: pip install 'cottention[harness]'"
    )


def by_hand(model: Any, context: str, target: str) -> float:
    """Log-likelihood of a target behind end-of-text and a context, from one text alone in its batch."""
    tokenizer = tiny.bpe_tokenizer()
    before, ids = [0, *tokenizer(context)["input_ids"]], tokenizer(target)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *ids]]), use_cache=False).logits[0].double()
    scores = logits.log_softmax(-1)[len(before) - 1 : -1]
    return float(scores[torch.arange(len(ids)), ids].sum())


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
def test_a_score_depends_on_its_own_request_alone(attention_type: str, batch_size: int) -> None:
    from lm_eval.api.instance import Instance

    from cottention.evaluation.harness_model import HarnessModel

    model = tiny.gpt(attention_type, torch.float32).eval()
    lm = HarnessModel(model, tiny.bpe_tokenizer(), max_length=64, batch_size=batch_size)
    # The same tokens, split at every place, and others that begin alike.
    words = ["the", " people", " of", " the", " United", " people"]
    pairs = [("".join(words[:at]), "".join(words[at:])) for at in range(1, 6)]
    pairs += [("the people of the United", target) for target in (" States", " people", " of")] + pairs[:2]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    scores = [score for score, _ in lm.loglikelihood(requests)]
    assert scores == pytest.approx([by_hand(model, *pair) for pair in pairs], abs=1e-4)
    assert [score for score, _ in lm.loglikelihood(requests[::-1])] == pytest.approx(scores[::-1], abs=1e-4)
    for request, score in zip(requests, scores, strict=True):
        assert lm.loglikelihood([request])[0][0] == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_whole_texts_that_end_alike_are_scored_each_by_itself(batch_size: int) -> None:
    from lm_eval.api.instance import Instance

    from cottention.evaluation.harness_model import HarnessModel

    model = tiny.gpt(dtype=torch.float32).eval()
    lm = HarnessModel(model, tiny.bpe_tokenizer(), max_length=8, batch_size=batch_size)
    texts = [f"{head} the people of the United States, in order" for head in ("Order!", "And tea. Order", "A")]
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    together = lm.loglikelihood_rolling(requests)
    assert together == pytest.approx([lm.loglikelihood_rolling([one])[0] for one in requests], abs=1e-4)
    single = HarnessModel(model, tiny.bpe_tokenizer(), max_length=8, batch_size=1)
    assert together == pytest.approx([single.loglikelihood_rolling([one])[0] for one in requests], abs=1e-4)
