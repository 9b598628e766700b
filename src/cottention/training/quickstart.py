"""The quickstart: a small model of real text in minutes, its score beside that of mere counting, and what it can do.

The run directory is that of `pretrain` plus quickstart.json: what was asked for, what fits into that time on this
machine, and in the end the report. So the same call continues a killed run with what is left of its time, and shows the
report of a finished one at once (nothing heavy is imported for that).

    report = run_quickstart(QuickstartSettings(minutes=5))
    report.scores["model"]["nats_per_byte"], report.scores["bigram"]["nats_per_byte"]
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cottention.errors import SettingsError
from cottention.locks import sole_writer
from cottention.logging import get_logger
from cottention.training.checkpoints import finished_model, write_atomically, writing_to
from cottention.training.metrics import read_metrics
from cottention.training.recipe import RECIPE_CLASSES, Recipe
from cottention.training.recipe_files import load_recipe, replace_settings

if TYPE_CHECKING:
    from cottention.training.pretraining import PretrainResult
    from cottention.training.text import PreparedText

RECORD = "quickstart.json"
"""What a quickstart writes into its run directory, before the run begins and at its end."""
_FITTED = ("precision", "minutes", "max_steps", "eval_every", "save_every")
BLOCKS = ("recommended", "published")
_REMEDY = "choose another --output-dir, or --overwrite to start again"

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """What can be asked for."""

    arch: Literal["gpt", "bert"] = "gpt"
    """A GPT writes text, a BERT fills masks."""
    minutes: float = 5.0
    """About how long the training takes, here and now; data and scores come on top."""
    attention_type: Literal["cosine", "softmax"] = "cosine"
    """Linear cosine attention, or the softmax twin with the same parts around it."""
    block: Literal["recommended", "published"] = "recommended"
    """The block that the study of quality recommends, or the paper's; of a GPT."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        if self.arch not in RECIPE_CLASSES:
            raise SettingsError(f"arch must be one of {', '.join(RECIPE_CLASSES)}; got {self.arch!r}")
        if self.block not in BLOCKS:
            raise SettingsError(f"block must be one of {', '.join(BLOCKS)}; got {self.block!r}")
        if self.arch == "bert" and self.block != "recommended":
            raise SettingsError(f"block is a GPT's; got {self.block!r} with arch='bert'")
        if not (math.isfinite(self.minutes) and self.minutes > 0):
            raise SettingsError(f"minutes must be positive; got {self.minutes}")

    @property
    def output_dir(self) -> str:
        """Where the run goes unless another directory is named."""
        kind = "" if self.attention_type == "cosine" else f"-{self.attention_type}"
        return f"runs/quickstart-{self.arch}{kind}" + ("-published" if self.block == "published" else "")

    def recipe(self) -> Recipe:
        """The packaged recipe, its length not fitted yet."""
        changes = {"model.attention_type": self.attention_type, "training.seed": self.seed}
        return load_recipe(f"quickstart_{self.arch}" + ("_published" if self.block == "published" else ""), changes)


@dataclass(frozen=True, kw_only=True)
class QuickstartReport:
    """What a quickstart left behind."""

    settings: QuickstartSettings
    """What was asked for."""
    run_dir: str
    """The run directory."""
    model_dir: str | None = None
    """The model, which every other command opens; None when a signal stopped the run before its end."""
    exit_code: int = 0
    """What a command that ran this returns: 0, or 128 and the signal's number as a shell has it."""
    num_parameters: int = 0
    """Weights of the model."""
    vocab_size: int = 0
    """Tokens of the tokenizer."""
    num_steps: int = 0
    """Updates made."""
    num_tokens: int = 0
    """Tokens read in training."""
    training_s: float = 0.0
    """Seconds of training alone, in all sessions."""
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    """On all of the held-out text: "model" and the baselines; see `quickstart_scores.score`."""
    trigram: dict[str, Any] = field(default_factory=dict)
    """Of a GPT: what counting three tokens gives there; beside `scores`, whose names programs know."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """What the model does; see `quickstart_scores.try_out`."""

    def as_dict(self) -> dict[str, Any]:
        """The report in plain types, for JSON."""
        return dataclasses.asdict(self)


def run_quickstart(
    settings: QuickstartSettings | None = None,
    *,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    recipe: Recipe | None = None,
    on_scores: Callable[[QuickstartReport], None] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> QuickstartReport:
    """Train, score and try out a small model; continue such a run, or show a finished one.

    Args:
        settings: what is wanted; None: a cosine GPT of the recommended block in 5 minutes.
        output_dir: the run directory; None: the settings' own.
        overwrite: delete the run that is in the directory and start again.
        recipe: trained instead of the packaged one; its max_steps is fitted all the same.
        on_scores: called with the report as soon as it has scores, before there are examples.
        on_text: called with a GPT's prompt and each new piece of the text that it writes.

    Returns:
        The report.

    Raises:
        SettingsError: the directory holds something else than such a run.
        CottentionError: whatever `pretrain` refuses.
    """
    settings = settings or QuickstartSettings()
    run_dir = Path(output_dir or settings.output_dir)
    with ExitStack() as held:
        with writing_to(run_dir):
            held.enter_context(sole_writer(run_dir))
        return _quickstart(settings, run_dir, overwrite, recipe, on_scores, on_text)


def _quickstart(
    settings: QuickstartSettings,
    run_dir: Path,
    overwrite: bool,
    recipe: Recipe | None,
    on_scores: Callable[[QuickstartReport], None] | None,
    on_text: Callable[[str], None] | None,
) -> QuickstartReport:
    record = None if overwrite else _read(run_dir, settings)
    if record is not None and record["report"] is not None and finished_model(run_dir / "model"):
        logger.info("%s is finished already; --overwrite starts again", run_dir)
        report = _report_of(record["report"], settings, run_dir)
        if on_scores is not None:
            on_scores(report)
        if on_text is not None and settings.arch == "gpt":
            on_text(report.examples[0]["prompt"] + report.examples[0]["text"])
        return report

    recipe, text = _fitted(recipe or settings.recipe(), settings, run_dir, record, overwrite)
    from cottention.training.pretraining import pretrain
    from cottention.training.quickstart_scores import open_model, score, try_out

    trained = pretrain(recipe, output_dir=run_dir, overwrite=overwrite, text=text)
    report = _report_of_training(settings, recipe, trained)
    if trained.model_dir is None:
        return report
    model, tokenizer = open_model(recipe, trained.model_dir)
    scores = score(recipe, model, tokenizer)
    report = dataclasses.replace(
        report,
        num_parameters=model.num_parameters(),
        vocab_size=len(tokenizer),
        trigram=scores.pop("trigram", {}),
        scores=scores,
    )
    if on_scores is not None:
        on_scores(report)
    report = dataclasses.replace(report, examples=try_out(model, tokenizer, seed=settings.seed, on_text=on_text))
    _write(run_dir, settings, recipe, report)
    return report


def _fitted(
    recipe: Recipe, settings: QuickstartSettings, run_dir: Path, record: dict[str, Any] | None, overwrite: bool
) -> tuple[Recipe, PreparedText | None]:
    """The recipe with its number of steps: that of the run that goes on, or what fits into the time."""
    if record is not None:
        return replace_settings(recipe, {f"training.{name}": value for name, value in record["fitted"].items()}), None
    from cottention.training.pretraining import check_run_directory  # seconds of torch
    from cottention.training.text import prepare_text
    from cottention.training.time_budget import fit_to_time

    check_run_directory(recipe, run_dir, resume=False, overwrite=overwrite)
    text = prepare_text(recipe, None)
    recipe = fit_to_time(recipe, text, budget_s=60 * settings.minutes)
    _write(run_dir, settings, recipe, None)
    return recipe, text


def _report_of_training(settings: QuickstartSettings, recipe: Recipe, trained: PretrainResult) -> QuickstartReport:
    times = [entry["elapsed_s"] for entry in read_metrics(trained.run_dir / "metrics.jsonl") if "elapsed_s" in entry]
    return QuickstartReport(
        settings=settings,
        run_dir=str(trained.run_dir),
        model_dir=None if trained.model_dir is None else str(trained.model_dir),
        exit_code=trained.exit_code,
        num_steps=trained.step,
        num_tokens=recipe.tokens_after(trained.step),
        training_s=times[-1] if times else 0.0,
    )


# The record, quickstart.json


def _write(run_dir: Path, settings: QuickstartSettings, recipe: Recipe, report: QuickstartReport | None) -> None:
    record = {
        "settings": dataclasses.asdict(settings),
        "fitted": {name: getattr(recipe.training, name) for name in _FITTED},
        "report": None if report is None else report.as_dict(),
    }
    with writing_to(run_dir):
        write_atomically(run_dir / RECORD, json.dumps(record, indent=1, ensure_ascii=False))


def _read(run_dir: Path, settings: QuickstartSettings) -> dict[str, Any] | None:
    """The record of a quickstart that began here; None when none did.

    Raises:
        SettingsError: it asked for something else, or is damaged.
    """
    path = run_dir / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        there, _ = dict(record["settings"]), (dict(record["fitted"]), record["report"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SettingsError(f"{path} is damaged; {_REMEDY}") from error
    for name, value in dataclasses.asdict(settings).items():
        if there.get(name) != value:
            raise SettingsError(
                f"{run_dir} holds another quickstart: {name} ({there.get(name)} there, {value} now); {_REMEDY}"
            )
    return record


def _report_of(content: dict[str, Any], settings: QuickstartSettings, run_dir: Path) -> QuickstartReport:
    """A stored report, with the directory where it is now."""
    return QuickstartReport(
        **{**content, "settings": settings, "run_dir": str(run_dir), "model_dir": str(run_dir / "model")}
    )
