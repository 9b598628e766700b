"""One pretraining run: data, model, loop, model directory; continues where a killed run stopped.

The run directory holds recipe.yaml (resolved), metrics.jsonl, loss_curve.png, tokenizer/, checkpoints/ and at the end
model/, which every other command opens. The same call on the same directory resumes from the newest intact checkpoint.

    result = pretrain(load_recipe("quickstart_gpt"), output_dir="runs/mine")
    result.model_dir, result.metrics["val_nats_per_byte"]
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from cottention.data.corpus import DEFAULT_CORPUS
from cottention.data.tokenizer_files import save_tokenizer
from cottention.errors import SettingsError
from cottention.locks import sole_writer
from cottention.logging import get_logger
from cottention.models.model_card import write_model_card
from cottention.seals import model_files, seal
from cottention.training.arguments import shared_out, training_arguments
from cottention.training.checkpointing_trainer import save_model
from cottention.training.checkpoints import (
    PARTS,
    atomic_directory,
    finished_model,
    list_checkpoints,
    newest_intact_checkpoint,
    write_atomically,
    writing_to,
)
from cottention.training.corpora import TRAINED
from cottention.training.metrics import read_metrics
from cottention.training.objectives import objective_of
from cottention.training.parallel import blocks_of
from cottention.training.quickstart import RECORD
from cottention.training.recipe import Recipe
from cottention.training.recipe_files import differing_setting, load_recipe, recipe_text, replace_settings
from cottention.training.reporting import Reports, check_trackers, draw_run
from cottention.training.sharded import whole_weights
from cottention.training.starting import LongerSchedule, check_goes_further, open_start, set_aside
from cottention.training.text import PreparedText, prepare_text
from cottention.training.trainer import PretrainingTrainer

_RECIPE = "recipe.yaml"
_FOLDERS = ("checkpoints", "model", "tokenizer", "tensorboard")
_FILES = ("metrics.jsonl", "loss_curve.png")
_LOGS = (".log", ".out", ".err")

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """What a run left behind."""

    run_dir: Path
    """The run directory."""
    model_dir: Path | None
    """The finished model; None when a signal stopped the run before its end."""
    step: int
    """Updates made so far, in all sessions."""
    metrics: dict[str, Any]
    """The last held-out figures (step, tokens, val_loss, val_ppl, ...); empty before the first evaluation."""
    stopped_by: signal.Signals | None = None
    """The signal that stopped the run."""

    @property
    def exit_code(self) -> int:
        """What a command that ran this returns: 0, or 128 and the signal's number as a shell has it."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by

    def as_dict(self) -> dict[str, Any]:
        """The result in plain types, for JSON."""
        return {
            "run_dir": str(self.run_dir),
            "model_dir": None if self.model_dir is None else str(self.model_dir),
            "step": self.step,
            "held_out": self.metrics,
        }


def pretrain(
    recipe: Recipe,
    *,
    output_dir: str | Path,
    resume: bool = True,
    overwrite: bool = False,
    extend: bool = False,
    text: PreparedText | None = None,
) -> PretrainResult:
    """Pretrain a model.

    Args:
        recipe: all choices.
        output_dir: the run directory; made when missing.
        resume: continue from the newest intact checkpoint when the directory holds a run of the same recipe; without
            it a used directory is refused.
        overwrite: delete the run that is in the directory and start again.
        extend: let a run of the same recipe but for a smaller training.max_steps go on to this one; the rate follows
            the longer run's line from there on, and a finished model is kept as model-STEPS.
        text: what `prepare_text` made of this recipe, for a caller who needed it before; None prepares it.

    Returns:
        Where the model is, and its last held-out figures.

    Raises:
        SettingsError: the directory holds a run of another recipe, or something else.
        InUseError: another process writes it.
        CheckpointError: every checkpoint is damaged, or the disk is full.
        DataError: the text cannot be used.
        NonFiniteLossError: the loss became infinite or NaN.
    """
    if not str(output_dir):
        raise SettingsError("the output directory must have a name; got ''")
    try:
        str(output_dir).encode()
    except UnicodeEncodeError:  # tokenizers and safetensors write no other
        raise SettingsError(f"the output directory must have a name in UTF-8; got {str(output_dir)!a}") from None
    check_trackers(recipe.training.report_to)
    run_dir = Path(output_dir)
    arguments = training_arguments(recipe, run_dir)
    with ExitStack() as held:
        with writing_to(run_dir):
            held.enter_context(sole_writer(run_dir, nested=True))
        return _pretrain(recipe, run_dir, arguments, resume=resume, overwrite=overwrite, extend=extend, text=text)


def _pretrain(
    recipe: Recipe,
    run_dir: Path,
    arguments: TrainingArguments,
    *,
    resume: bool,
    overwrite: bool,
    extend: bool,
    text: PreparedText | None,
) -> PretrainResult:
    """The run, in a directory that nobody else writes."""
    model_dir = run_dir / "model"
    layout = recipe.parallelism.layout(max(1, arguments.world_size))
    given, recipe = recipe, shared_out(recipe, layout.num_readers)
    # Process 0 prepares everything; the others then find the run started, whatever was asked for.
    with arguments.main_process_first(local=False):
        is_first = arguments.process_index == 0
        continues = check_run_directory(
            given, run_dir, resume=resume or not is_first, overwrite=overwrite and is_first, extend=extend
        )
        # Where it has begun anew, process 0 may have written the longer recipe already.
        ended_at = load_recipe(run_dir / _RECIPE).training.max_steps if continues else recipe.training.max_steps
        if ended_at < recipe.training.max_steps:
            check_goes_further(run_dir, recipe)
        elif continues and finished_model(model_dir):
            logger.info("%s is finished already: %s", run_dir, model_dir)
            return PretrainResult(
                run_dir=run_dir,
                model_dir=model_dir,
                step=_last_held_out(run_dir).get("step", recipe.training.max_steps),
                metrics=_last_held_out(run_dir),
            )
        checkpoint = newest_intact_checkpoint(run_dir / "checkpoints", PARTS) if continues else None
        start = open_start(recipe) if checkpoint is None else None
        if text is None:
            text = prepare_text(recipe, run_dir if continues or not is_first else None)
        set_seed(recipe.training.seed)
        model = build_model(recipe, text.tokenizer)
        if start is not None:
            start.hand_over(model)
        if is_first and ended_at < recipe.training.max_steps:
            set_aside(run_dir, ended_at)
        if is_first and not continues:
            claim_run_directory(given, run_dir, text.tokenizer)
        if is_first and continues and load_recipe(run_dir / _RECIPE) != given:  # goes on with other micro batches, say
            write_atomically(run_dir / _RECIPE, recipe_text(given))
    if is_first and recipe != given:
        logger.info(
            "micro batches of %d windows on each of %d processes (training.micro_batch_size: %d)",
            recipe.training.micro_batch_size,
            arguments.world_size,
            given.training.micro_batch_size,
        )
    if recipe.num_warmup_steps >= recipe.training.max_steps:
        logger.warning(
            "the learning rate never reaches its peak: optimizer.warmup_steps is %d of training.max_steps=%d",
            recipe.num_warmup_steps,
            recipe.training.max_steps,
        )
    trainer = PretrainingTrainer(recipe, model, arguments=arguments, text=text, run_dir=run_dir)
    trainer.add_callback(Reports(recipe, run_dir))
    if extend and checkpoint is not None:
        trainer.add_callback(LongerSchedule())
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
    trainer.fit(checkpoint)
    stopped_by = trainer.run_control.stopped_by
    weights = None
    if stopped_by is None and trainer.processes.parallel.is_sharded:
        weights = whole_weights(model, keep=trainer.processes.is_first)
    if trainer.processes.is_first:
        with writing_to(run_dir):
            draw_run(run_dir)
            if stopped_by is None:  # last of all, for with a model the run counts as finished
                with atomic_directory(model_dir, sealed=False) as staging:
                    save_model(model, text.tokenizer, staging, weights=weights)
                    write_model_card(
                        staging,
                        recipe={"arch": recipe.arch, **dataclasses.asdict(recipe)},
                        metrics=_results(run_dir),
                        name=run_dir.resolve().name,
                        path=".",
                        data=_held_out_name(recipe),
                        license=_license(recipe),
                    )
                    seal(staging, model_files(staging, tokenizer=True))
    trainer.processes.wait_for_everyone()
    step = trainer.state.global_step
    if stopped_by is not None:
        logger.info("stopped after step %d of %d; the same command continues", step, trainer.state.max_steps)
    return PretrainResult(
        run_dir=run_dir,
        step=step,
        model_dir=model_dir if stopped_by is None else None,
        metrics=_last_held_out(run_dir),
        stopped_by=stopped_by,
    )


def check_run_directory(
    recipe: Recipe, run_dir: Path, *, resume: bool = True, overwrite: bool = False, extend: bool = False
) -> bool:
    """Say whether the directory holds a run of this recipe that goes on, with `extend` to more steps; change nothing.

    Raises:
        SettingsError: it holds a run of another recipe, or something else than a run, or cannot be written.
    """
    if run_dir.is_dir() and not os.access(run_dir, os.W_OK):
        raise SettingsError(f"the run directory must be writable; got {run_dir}")
    recipe_file = run_dir / _RECIPE
    if not recipe_file.is_file():
        foreign = _foreign(run_dir)
        if foreign is not None:
            raise SettingsError(f"{run_dir} holds {foreign} but no {_RECIPE}; choose another --output-dir")
        return False
    if overwrite or not (list_checkpoints(run_dir / "checkpoints") or (run_dir / "model").is_dir()):
        return False  # a run that was stopped before its first checkpoint starts again too
    remedy = "choose another --output-dir, or --overwrite to start again"
    there = load_recipe(recipe_file)
    if extend and there.training.max_steps < recipe.training.max_steps:
        recipe = replace_settings(recipe, {"training.max_steps": there.training.max_steps})
    difference = differing_setting(recipe, there)
    if difference is not None:
        raise SettingsError(f"{run_dir} holds a run of another recipe: {difference}; {remedy}")
    if not resume:
        raise SettingsError(f"{run_dir} holds a run already; {remedy}")
    return True


def _foreign(run_dir: Path) -> str | None:
    """What lies in a directory that no run has begun in, and no shell and no scheduler has put there."""
    names = sorted(entry.name for entry in run_dir.iterdir()) if run_dir.is_dir() else []
    strange = [name for name in names if not name.startswith(".") and not name.endswith(_LOGS) and name != RECORD]
    return strange[0] if strange else None


def claim_run_directory(recipe: Recipe, run_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Begin a new run: delete what an earlier one left, write the resolved recipe and the tokenizer trained for it."""
    with writing_to(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in _FOLDERS:
            shutil.rmtree(run_dir / name, ignore_errors=True)
        for name in _FILES:
            (run_dir / name).unlink(missing_ok=True)
        write_atomically(run_dir / _RECIPE, recipe_text(recipe))
        if recipe.data.tokenizer == TRAINED:
            with atomic_directory(run_dir / "tokenizer", sealed=False) as staging:
                save_tokenizer(tokenizer, staging)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedModel:
    """Build the freshly initialised model of a recipe.

    Args:
        recipe: its section `model` and, for a GPT, the window length.
        tokenizer: gives the numbers of the special tokens; None keeps the config's defaults.

    Raises:
        SettingsError: the tokenizer has more tokens than the model has rows.
    """
    fields = recipe.config_fields()
    if tokenizer is not None:
        if len(tokenizer) > recipe.model.vocab_size:
            raise SettingsError(
                f"model.vocab_size must be at least the tokenizer's {len(tokenizer)}; got {recipe.model.vocab_size}"
            )
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        fields |= {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    model = objective_of(recipe).new_model(fields)
    if recipe.training.gradient_checkpointing:
        # transformers 5.23 renamed it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if recipe.training.compile:
        import torch._dynamo  # seconds, for those who want it

        # How many tokens are hidden differs from batch to batch; the graph would end where they are chosen.
        torch._dynamo.config.capture_dynamic_output_shape_ops = True
        for part in blocks_of(model) if recipe.parallelism.shard > 1 else [model]:  # weights come block by block
            part.compile()
    return model


def _last_held_out(run_dir: Path) -> dict[str, Any]:
    lines = [entry for entry in read_metrics(run_dir / "metrics.jsonl") if "val_loss" in entry]
    return lines[-1] if lines else {}


def _results(run_dir: Path) -> dict[str, Any]:
    """The last losses and the last figures on held-out text, without what the run was doing meanwhile."""
    training = [entry for entry in read_metrics(run_dir / "metrics.jsonl") if "val_loss" not in entry]
    figures = {**(training[-1] if training else {}), **_last_held_out(run_dir)}
    return {name: value for name, value in figures.items() if name.startswith("val_") or "loss" in name}


def _held_out_name(recipe: Recipe) -> str:
    """The held-out text in a few words, without the folders that it lies in."""
    data = recipe.data
    if isinstance(data.validation, (int, float)):
        own = data.source == DEFAULT_CORPUS
        return f"{_names(data.source)}, {'its held-out years' if own else f'{data.validation:.3g} of the documents'}"
    return _names(data.validation)


def _license(recipe: Recipe) -> str | None:
    """The package's own for weights that know its embedded text alone, which is in the public domain; else None."""
    source = recipe.data.source
    sources = [source] if isinstance(source, str) else source
    knows_others = recipe.training.init_from is not None
    return "mit" if not knows_others and {name.partition(":")[0] for name in sources} == {DEFAULT_CORPUS} else None


def _names(source: str | list[str]) -> str:
    return ", ".join(Path(name).name for name in ([source] if isinstance(source, str) else source))
