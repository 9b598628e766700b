"""EleutherAI's lm-evaluation-harness on our models: LAMBADA and whatever else it has, or task files of one's own.

The library `lm-eval` is an extra, `pip install 'cottention[harness]'`. Its own tasks fetch their data from the Hugging
Face Hub; a folder of task files (YAML, in lm-eval's format) with local data works offline and is looked at first. Task
files may name Python functions, which then run: take folders from people you trust.

    result = evaluate_harness(model, tokenizer, ["lambada_local"], include_path="tasks/")
    result.scores[0].value, result.scores[0].stderr
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.errors import CottentionError, DataError, SettingsError, did_you_mean
from cottention.evaluation.perplexity import check_context
from cottention.files import one_line
from cottention.models.configuration import check_vocabulary

_SEED = 1234  # of few-shot examples and bootstraps; lm-eval's own default
_BOOTSTRAPS = 1000  # for the standard error of what is no mean, such as perplexity; lm-eval's 100,000 take minutes


@dataclass(frozen=True, kw_only=True)
class HarnessScore:
    """One metric of one task."""

    task: str
    """The task's name."""
    metric: str
    """As lm-eval calls it: acc, perplexity, word_perplexity ..."""
    filter: str
    """What was done to the answers before they were scored; mostly none."""
    value: float
    """The score."""
    stderr: float | None
    """Its standard error; None where lm-eval has none."""
    num_samples: int
    """Questions that were scored."""


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """Every metric of every task, in the order asked for."""

    scores: tuple[HarnessScore, ...]
    """One per task, metric and filter."""
    context: int
    """Tokens that a text could have, end-of-text before it included; longer ones lost their beginning."""
    lm_eval_version: str
    """Version of the harness."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "context": self.context,
            "lm_eval_version": self.lm_eval_version,
            "scores": [asdict(score) for score in self.scores],
        }


def evaluate_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    context: int | None = None,
    batch_size: int = 8,
) -> HarnessResult:
    """Run tasks of lm-evaluation-harness.

    Args:
        model: a CottentionGPTForCausalLM; runs where it is, in the type it has.
        tokenizer: its tokenizer, with an end-of-text token, which comes before every text.
        tasks: names of tasks, groups or tags.
        include_path: a folder of task files; where it has all the tasks, lm-eval's own are not even listed.
        num_fewshot: worked examples before each question; None: as the task says.
        limit: questions per task at most; for a first look.
        context: tokens that the model reads at most; None: its training window. A cosine model reads more.
        batch_size: texts per forward pass.

    Raises:
        SettingsError: lm-eval is missing, a task is unknown, or a number makes no sense.
        DataError: a task file is damaged, or its data cannot be had.
    """
    if context is None:
        context = int(model.config.n_positions)
    check_context(model, context)
    check_vocabulary(tokenizer, model.config)
    _check(tokenizer, tasks, include_path, num_fewshot, limit, context, batch_size)
    lm_eval_version = _installed()
    was_training = model.training
    model.eval()
    try:
        with _quiet():
            loaded = _load(list(dict.fromkeys(tasks)), include_path)
            results = _run(model, tokenizer, loaded, num_fewshot, limit, context, batch_size)
    finally:
        model.train(was_training)
    return HarnessResult(scores=tuple(_scores(results)), context=context, lm_eval_version=lm_eval_version)


def _check(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    include_path: str | Path | None,
    num_fewshot: int | None,
    limit: int | None,
    context: int,
    batch_size: int,
) -> None:
    rules = (
        (len(tasks) >= 1, "tasks must name at least one task; got none"),
        (context >= 2, f"context must be at least 2: end-of-text and a token; got {context}"),
        (num_fewshot is None or num_fewshot >= 0, f"num_fewshot must be 0 or more; got {num_fewshot}"),
        (limit is None or limit >= 1, f"limit must be at least 1; got {limit}"),
        (batch_size >= 1, f"batch_size must be at least 1; got {batch_size}"),
        (tokenizer.eos_token_id is not None, "the tokenizer has no end-of-text token (eos_token), which opens a text"),
        (include_path is None or Path(include_path).is_dir(), f"include_path must be a folder; got {include_path}"),
    )
    for holds, complaint in rules:
        if not holds:
            raise SettingsError(complaint)


def _installed() -> str:
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"the harness needs lm-eval ({error.name} is missing); run: pip install 'cottention[harness]'"
        ) from error
    return lm_eval.__version__


def _load(tasks: list[str], include_path: str | Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    try:
        manager = None
        if include_path is not None:
            # lm-eval's own tasks are thousands of files, ten seconds to list.
            manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if manager is None or not set(tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=None if include_path is None else str(include_path))
        known = manager.all_tasks
        for task in tasks:
            if task not in known:
                raise SettingsError(f"there is no task {task!r}{did_you_mean(task, known)}")
        return manager.load(tasks)
    except CottentionError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise DataError(f"the tasks {', '.join(tasks)} cannot be loaded: {one_line(error)}") from error


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: Any,
    num_fewshot: int | None,
    limit: int | None,
    context: int,
    batch_size: int,
) -> Any:
    from lm_eval.evaluator import evaluate

    from cottention.evaluation.harness_model import HarnessModel

    for task in loaded["tasks"].values():
        # What lm-eval's simple_evaluate does, which would also look up this machine's packages and drivers.
        if num_fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=_SEED)
    lm = HarnessModel(model, tokenizer, max_length=context, batch_size=batch_size)
    return evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False)


def _scores(results: Any) -> Iterator[HarnessScore]:
    """Read lm-eval's table, whose keys are "metric,filter" and "metric_stderr,filter"."""
    for task, figures in results["results"].items():
        num_samples = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in figures.items():
            metric, comma, chosen_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = figures.get(f"{metric}_stderr,{chosen_filter}")
            known = isinstance(stderr, (int, float)) and math.isfinite(stderr)
            yield HarnessScore(
                task=task,
                metric=metric,
                filter=chosen_filter,
                value=float(value),
                stderr=float(stderr) if known else None,
                num_samples=int(num_samples),
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep stdout for the result, hold back what lm-eval logs about models that are objects, and start no processes."""
    logger, was_set = logging.getLogger("lm_eval"), "DISABLE_MULTIPROC" in os.environ
    before = logger.level
    logger.setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # those of the bootstrap, which is over before they have begun
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)
        if not was_set:
            del os.environ["DISABLE_MULTIPROC"]
