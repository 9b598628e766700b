"""Turns a checkpoint of the published research code into one of ours, and proves that nothing changed on the way.

The published config.json names a stock class; that attention is cosine shows only in the norm_const keys of the weights
(and in config.pt). Names and shapes are checked both ways against our model, so no weight is missing or ignored
silently; after writing, every tensor is read back and compared bit by bit.

    report = convert_official("Cosine_Attention_BERT", "models/bert-cosine")
    print(report.summary())
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.convert.assemble import build_model, detect_attention_type, same_bits, settle_special_tokens
from cottention.convert.atomic import check_destination, written_whole
from cottention.convert.configs import AttentionType, TrainingSettings, read_training_settings, translate_config
from cottention.convert.report import REPORT_NAME, ConversionReport, LeftOut
from cottention.convert.tokenizers import TOKENIZER_FILES, read_tokenizer
from cottention.convert.weights import WEIGHT_FILES, listed, read_weights
from cottention.errors import CheckpointError
from cottention.generation.loading import quiet_progress
from cottention.generation.source import one_line, resolve_directory

# Only these are fetched from the Hub: optimizer.pt is twice the size of the weights, tokenizer.pt is a pickled object.
_HUB_FILES = (
    "config.json",
    "config.pt",
    *TOKENIZER_FILES,
    *(f"{name}.index.json" for name in WEIGHT_FILES),
    "model*.safetensors",
    "pytorch_model*.bin",
)
_WHY_LEFT_OUT = {
    "optimizer.pt": "optimiser state; fine-tuning starts a new one",
    "scheduler.pt": "learning-rate schedule; fine-tuning starts a new one",
    "tokenizer.pt": "a pickled object, which could run code; the text files hold the same tokenizer",
    "training_args.bin": "a pickled object, which could run code",
    "generation_config.json": "made anew from config.json",
}


def convert_official(
    source: str | Path, destination: str | Path, *, overwrite: bool = False, revision: str | None = None
) -> ConversionReport:
    """Convert a checkpoint of the published layout to a directory that `from_pretrained` opens.

    Args:
        source: directory as the published code writes it, or OWNER/NAME on the Hugging Face Hub.
        destination: directory to write; appears only when complete.
        overwrite: replace a model that is at `destination`.
        revision: branch, tag or commit on the Hub.

    Returns:
        What was read, what was left out and why; also written to conversion_report.json.

    Raises:
        CheckpointError: `source` is missing, damaged, incomplete, contradictory, or contains pickled code, or
            `destination` cannot be written.
    """
    destination = Path(destination).expanduser()
    check_destination(destination, overwrite=overwrite)
    directory = resolve_directory(source, file_patterns=_HUB_FILES, revision=revision)
    _check_apart(directory, destination)

    translated = translate_config(directory)
    weights = read_weights(directory)
    attention_type = detect_attention_type(weights.tensors)
    settings, left_out = _training_settings(directory, attention_type)
    model, left_out_tensors = build_model(translated, attention_type, weights.tensors)
    tokenizer, tokenizer_files = read_tokenizer(
        directory, translated.architecture, vocab_size=translated.fields["vocab_size"]
    )
    settle_special_tokens(model, tokenizer, attention_type)

    files_read = ("config.json", *weights.files, *tokenizer_files, *(["config.pt"] if settings else []))
    left_out += _files_left_out(directory, {*files_read, *(item.name for item in left_out)})
    left_out += left_out_tensors
    if translated.left_out:
        fields = ", ".join(translated.left_out)
        left_out.append(LeftOut(name=f"in config.json {fields}", reason="settings without a meaning here"))
    report = ConversionReport(
        source=str(source),
        commit=None if directory == Path(source).expanduser() else directory.name,
        destination=str(destination),
        architecture=translated.architecture,
        attention_type=attention_type,
        model_class=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        num_tensors=len(list(model.parameters())),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        training_step=settings.step if settings else None,
        tokenizer=type(tokenizer).__name__ if tokenizer is not None else None,
        files_read=files_read,
        left_out=tuple(left_out),
        notes=_notes(model, tokenizer),
    )
    _write(destination, model, tokenizer, report, overwrite=overwrite)
    return report


def _check_apart(source: Path, destination: Path) -> None:
    source, destination = source.resolve(), destination.resolve()
    if destination == source or destination in source.parents:
        raise CheckpointError(f"{destination} holds the source itself; name another destination")


def _training_settings(directory: Path, attention_type: AttentionType) -> tuple[TrainingSettings | None, list[LeftOut]]:
    """Read config.pt where it is there; a broken one costs the step count alone, a contradicting one is refused."""
    path = directory / "config.pt"
    if not path.is_file():
        return None, []
    try:
        settings = read_training_settings(path)
    except CheckpointError as error:
        return None, [LeftOut(name=path.name, reason=one_line(error))]
    if settings.attention_type not in (None, attention_type):
        seen = "hold norm_const" if attention_type == "cosine" else "hold no norm_const"
        raise CheckpointError(f"{path} says {settings.attention_type} attention, but the weights {seen}")
    return settings, []


def _files_left_out(directory: Path, mentioned: set[str]) -> list[LeftOut]:
    weights = ("pytorch_model", "model.safetensors", "model-")
    left_out = []
    for name in sorted(entry.name for entry in directory.iterdir() if entry.name not in mentioned):
        otherwise = "other weights were read" if name.startswith(weights) else "not part of the published layout"
        left_out.append(LeftOut(name=name, reason=_WHY_LEFT_OUT.get(name, otherwise)))
    return left_out


def _notes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, ...]:
    notes = []
    if tokenizer is None:
        notes.append("no tokenizer files: generation and fill-mask need one saved into the directory")
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    if len(dtypes) > 1:
        notes.append(f"the tensors have several types ({', '.join(dtypes)}); all are kept as they are")
    not_finite = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if not_finite:
        notes.append(f"NaN or infinite values in {listed(not_finite)}")
    return tuple(notes)


def _write(
    destination: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    report: ConversionReport,
    *,
    overwrite: bool,
) -> None:
    try:
        with written_whole(destination, overwrite=overwrite) as partial:
            with quiet_progress():
                model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            (partial / REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
            _verify(partial, model)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {destination}: {one_line(error)}") from error


def _verify(written: Path, model: PreTrainedModel) -> None:
    """Read the directory back, as files and as a user will, and compare every tensor."""
    stored = read_weights(written).tensors
    expected = {name: tensor for name, tensor in model.state_dict().items() if name in stored}
    changed = [name for name, tensor in stored.items() if name not in expected or not same_bits(tensor, expected[name])]

    with quiet_progress():
        reopened, info = cast(Any, type(model)).from_pretrained(written, dtype=model.dtype, output_loading_info=True)
    problems = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    state = reopened.state_dict()
    changed += [
        name
        for name, tensor in model.state_dict().items()
        if name not in state or not same_bits(tensor.to(state[name].dtype), state[name])
    ]
    if changed or problems:
        names = listed(sorted({*changed, *map(str, problems)}))
        raise CheckpointError(f"what was written to {written} reads back differently: {names}; is the disk faulty?")
