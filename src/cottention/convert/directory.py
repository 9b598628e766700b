"""Both ends of every conversion: which files of a source matter, and how the result is written and read back.

report = report_on(model, tokenizer, translated, source=source, directory=directory, ...)
write_model(Path("models/bert"), model, tokenizer, report, overwrite=False)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.convert.assemble import same_bits
from cottention.convert.configs import TranslatedConfig
from cottention.convert.report import REPORT_NAME, ConversionReport, LeftOut
from cottention.convert.tokenizers import TOKENIZER_FILES
from cottention.convert.weights import WEIGHT_FILES, listed, read_weights
from cottention.data.tokenizer_files import save_tokenizer
from cottention.errors import CheckpointError
from cottention.files import one_line, settle, write_text, written_directory
from cottention.generation.loading import quiet_progress
from cottention.locks import sole_writer
from cottention.seals import model_files, seal

HUB_FILES = (
    "config.json",
    *TOKENIZER_FILES,
    *(f"{name}.index.json" for name in WEIGHT_FILES),
    "model*.safetensors",
    "pytorch_model*.bin",
)
"""All that is fetched from the Hub: optimizer.pt is twice the size of the weights, tokenizer.pt a pickled object."""

_WHY_LEFT_OUT = {
    "optimizer.pt": "optimiser state; fine-tuning starts a new one",
    "scheduler.pt": "learning-rate schedule; fine-tuning starts a new one",
    "tokenizer.pt": "a pickled object, which could run code; the text files hold the same tokenizer",
    "training_args.bin": "a pickled object, which could run code",
    "generation_config.json": "made anew from config.json",
}


@contextmanager
def claimed(destination: Path, *, overwrite: bool) -> Iterator[None]:
    """Be the only one who writes a destination, once it is known that it can be written.

    Raises:
        CheckpointError: it cannot be, or must not be replaced; see `check_destination`.
        InUseError: another conversion writes it.
    """
    with ExitStack() as held:
        try:
            held.enter_context(sole_writer(destination, beside=True))
        except OSError as error:
            raise CheckpointError(f"cannot write {destination}: {one_line(error)}") from error
        check_destination(destination, overwrite=overwrite)
        yield


def check_destination(destination: Path, *, overwrite: bool) -> None:
    """Clear up after killed calls, then refuse a destination that must not be replaced.

    Raises:
        CheckpointError: it holds something and `overwrite` is not set, or it holds no model.
    """
    settle(destination.absolute())
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not destination.is_dir():
        raise CheckpointError(f"{destination} is a file; expected the directory to write")
    if not overwrite:
        raise CheckpointError(f"{destination} exists already; pass --overwrite (overwrite=True) to replace it")
    if not (destination / "config.json").is_file():
        # --overwrite replaces a model. A home directory named by mistake must survive it.
        raise CheckpointError(f"{destination} is not a model directory (no config.json): not replaced")


def check_apart(source: Path, destination: Path) -> None:
    """Refuse to write over what is being read.

    Raises:
        CheckpointError: `destination` is the source or holds it.
    """
    source, destination = source.resolve(), destination.resolve()
    if destination == source or destination in source.parents:
        raise CheckpointError(f"{destination} holds the source itself; name another destination")


def _files_left_out(directory: Path, mentioned: set[str]) -> list[LeftOut]:
    weights = ("pytorch_model", "model.safetensors", "model-")
    left_out = []
    for name in sorted(entry.name for entry in directory.iterdir() if entry.name not in mentioned):
        otherwise = "other weights were read" if name.startswith(weights) else "not part of the model"
        left_out.append(LeftOut(name=name, reason=_WHY_LEFT_OUT.get(name, otherwise)))
    return left_out


def _notes_on(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, ...]:
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


def report_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    translated: TranslatedConfig,
    *,
    source: str | Path,
    directory: Path,
    destination: Path,
    files_read: tuple[str, ...],
    left_out: Sequence[LeftOut] = (),
    notes: Sequence[str] = (),
    **findings: Any,
) -> ConversionReport:
    """Say what was read, what was left out and what came of it.

    Args:
        model: what will be written.
        tokenizer: likewise.
        translated: what config.json means.
        source: as the user named it.
        directory: where its files are.
        destination: where the result will be.
        files_read: files that the result was made from.
        left_out: what is known to be left out already.
        notes: what a user should know, beside what the weights show.
        **findings: other fields of the report.
    """
    mentioned = {*files_read, *(item.name for item in left_out)}
    left_out = [*left_out, *_files_left_out(directory, mentioned)]
    if translated.left_out:
        fields = ", ".join(translated.left_out)
        left_out.append(LeftOut(name=f"in config.json {fields}", reason="settings without a meaning here"))
    return ConversionReport(
        source=str(source),
        commit=None if directory == Path(source).expanduser() else directory.name,
        destination=str(destination),
        architecture=translated.architecture,
        attention_type=model.config.attention_type,
        model_class=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        num_tensors=len(list(model.parameters())),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokenizer=type(tokenizer).__name__ if tokenizer is not None else None,
        files_read=files_read,
        left_out=tuple(left_out),
        notes=(*notes, *_notes_on(model, tokenizer)),
        **findings,
    )


def write_model(
    destination: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    report: ConversionReport,
    *,
    overwrite: bool,
) -> None:
    """Write model, tokenizer and report as one directory, and read every tensor back.

    Raises:
        CheckpointError: `destination` cannot be written, or holds something else than what was written.
    """
    try:
        check_destination(destination, overwrite=overwrite)
        with written_directory(destination) as partial:
            with quiet_progress():
                cast(Any, model).save_pretrained(partial, seal=False)
            if tokenizer is not None:
                save_tokenizer(tokenizer, partial)
            write_text(partial / REPORT_NAME, json.dumps(report.to_dict(), indent=2) + "\n")
            _verify(partial, model)
            seal(partial, model_files(partial, tokenizer=True))
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
