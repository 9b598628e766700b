"""What the loop and its callbacks are told: a recipe as TrainingArguments, and the type that is computed in.

arguments = training_arguments(recipe, run_dir)
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from cottention.errors import SettingsError
from cottention.training.objectives import objective_of
from cottention.training.recipe import Recipe
from cottention.training.recipe_files import replace_settings

ENDLESS = 1_000_000_000
"""Steps of a run that something else ends."""


def training_arguments(recipe: Recipe, run_dir: Path) -> TrainingArguments:
    """How long a run is, in which portions, what is due when; sets up the processes and the device.

    Raises:
        SettingsError: the batch cannot be shared out among the processes.
    """
    settings = recipe.training
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(run_dir / "checkpoints"),
        max_steps=settings.max_steps if settings.minutes is None else ENDLESS,
        per_device_train_batch_size=settings.micro_batch_size,
        seed=settings.seed,
        max_grad_norm=recipe.optimizer.max_grad_norm or 0.0,
        logging_steps=settings.log_every,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_steps=settings.save_every,
        ddp_find_unused_parameters=objective_of(recipe).leaves_parameters_unused,
        dataloader_num_workers=2 if on_gpu else 0,
        dataloader_pin_memory=on_gpu,
        use_cpu=not on_gpu,
        report_to="none",
    )
    # Only now is the number of processes known.
    num_processes = max(1, arguments.world_size)
    num_readers = recipe.parallelism.layout(num_processes).num_readers
    if settings.minutes is not None and num_processes > 1:
        raise SettingsError(f"training.minutes needs one process, whose clock decides; got {num_processes}")
    shared = shared_out(recipe, num_readers).training
    arguments.per_device_train_batch_size = shared.micro_batch_size
    arguments.gradient_accumulation_steps = shared.accumulation_steps(num_readers)
    return arguments


def shared_out(recipe: Recipe, num_processes: int) -> Recipe:
    """The recipe with micro batches that so many processes make up a step of: its own, or the next smaller ones.

    Raises:
        SettingsError: the windows of a step cannot be shared out evenly.
    """
    settings = recipe.training
    share, rest = divmod(settings.global_batch_size, num_processes)
    # Where windows become longer, a micro batch is cut into so many passes.
    multiple = recipe.passes_at_most
    sizes = [size for size in range(multiple, settings.micro_batch_size + 1, multiple) if share % size == 0]
    if rest or not sizes:
        what = f"the {num_processes} processes" if multiple == 1 else f"{num_processes} processes x {multiple}"
        raise SettingsError(
            f"training.global_batch_size must be a multiple of {what}; got {settings.global_batch_size}"
        )
    return replace_settings(recipe, {"training.micro_batch_size": sizes[-1]})


def compute_type(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The type that a recipe computes in on a device: bf16 under autocast, or fp32."""
    return type_of(recipe.training.precision, device)


def type_of(precision: str, device: torch.device) -> torch.dtype:
    """The type that "auto", "bf16" or "fp32" means on a device."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32
