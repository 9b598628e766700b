"""Turns a checkpoint of the published research code into one of ours, and proves that nothing changed on the way.

The published config.json names a stock class; that attention is cosine shows only in the norm_const keys of the weights
(and in config.pt). Names and shapes are checked both ways against our model, so no weight is missing or ignored
silently; after writing, every tensor is read back and compared bit by bit.

    report = convert_official("Cosine_Attention_BERT", "models/bert-cosine")
    print(report.summary())
"""

from __future__ import annotations

from pathlib import Path

from cottention import models
from cottention.convert.assemble import build_model, detect_attention_type, settle_special_tokens
from cottention.convert.configs import AttentionType, TrainingSettings, read_training_settings, translate_config
from cottention.convert.directory import HUB_FILES, check_apart, claimed, report_on, write_model
from cottention.convert.report import ConversionReport, LeftOut
from cottention.convert.tokenizers import read_tokenizer
from cottention.convert.weights import read_weights
from cottention.errors import CheckpointError
from cottention.files import one_line
from cottention.generation.source import resolve_directory

_CLASSES = {"bert": ("BertForPreTraining",), "gptj": ("GPTJForCausalLM",)}


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
        What was read, what was left out and why; also written to conversion.json.

    Raises:
        CheckpointError: `source` is missing, damaged, incomplete, contradictory, or contains pickled code, or
            `destination` cannot be written.
    """
    destination = Path(destination).expanduser()
    with claimed(destination, overwrite=overwrite):
        return _converted(source, destination, overwrite, revision)


def _converted(source: str | Path, destination: Path, overwrite: bool, revision: str | None) -> ConversionReport:
    directory = resolve_directory(source, file_patterns=(*HUB_FILES, "config.pt"), revision=revision)
    check_apart(directory, destination)

    translated = translate_config(directory, _CLASSES)
    weights = read_weights(directory)
    attention_type = detect_attention_type(weights.tensors)
    settings, left_out = _training_settings(directory, attention_type)
    bert = translated.architecture == "bert"
    model_class = models.CottentionBertForPreTraining if bert else models.CottentionGPTForCausalLM
    built = build_model(translated, attention_type, weights.tensors, model_class)
    model = built.model
    tokenizer, tokenizer_files = read_tokenizer(
        directory, translated.architecture, vocab_size=translated.fields["vocab_size"]
    )
    settle_special_tokens(model, tokenizer, attention_type)

    report = report_on(
        model,
        tokenizer,
        translated,
        source=source,
        directory=directory,
        destination=destination,
        files_read=("config.json", *weights.files, *tokenizer_files, *(["config.pt"] if settings else [])),
        left_out=(*left_out, *built.left_out),
        training_step=settings.step if settings else None,
    )
    write_model(destination, model, tokenizer, report, overwrite=overwrite)
    return report


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
