"""Opens a saved model for use, or says in one line why it cannot.

transformers answers a wrong directory with a page of text, and fills missing weights with random numbers; here config,
kind, weights and tokenizer are looked at in turn, and the first thing that is wrong is named.

    model, tokenizer = load_model_and_tokenizer("runs/quickstart-gpt/model", "causal-lm")
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from cottention import models
from cottention.data.tokenizer_files import check_ids, is_damage, open_tokenizer
from cottention.errors import CheckpointError, CottentionError, SettingsError, did_you_mean
from cottention.files import one_line
from cottention.generation.source import resolve_directory
from cottention.json_files import read_json
from cottention.models.auto import REMOTE_MODULE
from cottention.models.configuration import check_token_id
from cottention.seals import SHARDS, check_model

Kind = Literal["causal-lm", "masked-lm", "next-sentence", "classifier", "encoder", "base", "text-labels", "word-labels"]

_BERT, _GPT = "cottention-bert", "cottention-gpt"
_CLASSES: dict[Kind, dict[str, str]] = {
    "causal-lm": {_GPT: "CottentionGPTForCausalLM"},
    "masked-lm": {_BERT: "CottentionBertForMaskedLM"},
    "next-sentence": {_BERT: "CottentionBertForPreTraining"},
    "classifier": {_BERT: "CottentionBertForSequenceClassification"},
    "encoder": {_BERT: "CottentionBertModel"},
    "base": {_BERT: "CottentionBertModel", _GPT: "CottentionGPTModel"},
    "text-labels": {
        _BERT: "CottentionBertForSequenceClassification",
        _GPT: "CottentionGPTForSequenceClassification",
    },
    "word-labels": {_BERT: "CottentionBertForTokenClassification", _GPT: "CottentionGPTForTokenClassification"},
}
_PURPOSES: dict[str, str] = {
    _GPT: "a GPT, which generates text",
    _BERT: "a BERT, which fills masks",
}
_NEEDED: dict[Kind, str] = {
    "causal-lm": _PURPOSES[_GPT],
    "masked-lm": _PURPOSES[_BERT],
    "next-sentence": "a BERT with a next-sentence head",
    "classifier": "a BERT",
    "encoder": "a BERT",
    "base": "a BERT or a GPT",
    "text-labels": "a BERT or a GPT",
    "word-labels": "a BERT or a GPT",
}
# Tensors whose absence means that the model never had this head, rather than that its file is incomplete.
_HEADS: dict[Kind, tuple[tuple[str, ...], str]] = {
    "next-sentence": (("cls.seq_relationship.",), "next-sentence head; pretrain with model.next_sentence_head"),
    "classifier": (("classifier.",), "classifier; fine-tune it first: cottention finetune"),
    "text-labels": (("classifier.", "score."), "classifier; fine-tune it first: cottention finetune"),
    "word-labels": (("classifier.",), "classifier; fine-tune it first: cottention finetune"),
}
_PUBLISHED_MODEL_TYPES = ("bert", "gptj")
# The module is fetched so that the snapshot is a whole directory for others; it is never imported from there.
_FILES = ("*.json", "model*.safetensors", "vocab.txt", "merges.txt", f"{REMOTE_MODULE}.py")


def load_model_and_tokenizer(
    source: str | Path, kind: Kind, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a model directory (or a Hub name) for inference.

    Args:
        source: directory written by training, `cottention convert` or `save_pretrained`, or OWNER/NAME on the Hub.
        kind: causal-lm opens a GPT to generate text; a BERT opens as masked-lm to fill masks, as next-sentence with
            both pretraining heads, as classifier with a fine-tuned head, as encoder without any (its pooler may
            be new); base opens either without a head, text-labels and word-labels either with a fine-tuned one.
        device: where to put the model; None takes a GPU when there is one.
        dtype: type of the weights; None keeps the stored one.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        CheckpointError: nothing there, not one of our models, of the other kind, incomplete or damaged.
        SettingsError: the device does not exist.
    """
    target = choose_device(device)
    directory = resolve_directory(source, file_patterns=_FILES)
    model_type = _check_config(directory, kind, source)
    _check_weights(directory, source)
    model = _load_model(directory, _CLASSES[kind][model_type], kind, source, dtype)
    tokenizer = _load_tokenizer(directory, source)
    check_ids(tokenizer, model.config.vocab_size, source)
    check_model(directory, tokenizer=True)
    model.config.output_attentions = False  # nobody here looks at maps, and decoding from a state has none
    model.to(target)  # pyright: ignore[reportArgumentType]  # the stub of Module.to loses torch.device here
    return model.eval(), tokenizer


def _check_config(directory: Path, kind: Kind, source: str | Path) -> str:
    path = directory / "config.json"
    if not path.is_file():
        inside = _model_inside(directory)
        hint = f"; it holds the model {Path(source) / inside}" if inside else ""
        raise CheckpointError(f"{source} is not a model directory: it has no config.json{hint}")
    config = read_json(path)
    model_type = config.get("model_type") if isinstance(config, dict) else None
    expected = _CLASSES[kind]
    if isinstance(model_type, str) and model_type in expected:
        return model_type
    if not isinstance(model_type, str):
        model_type = None
    if model_type in _PURPOSES:
        raise CheckpointError(f"{source} is {_PURPOSES[model_type]}; needed is {_NEEDED[kind]}")
    if model_type in _PUBLISHED_MODEL_TYPES:
        raise CheckpointError(
            f"{source} is a checkpoint of a stock class ({model_type}); convert it first: cottention convert softmax "
            f"{source} NEW_DIRECTORY (official, not softmax, if the published code wrote it)"
        )
    raise CheckpointError(
        f"{source} is not one of our models: model_type is {model_type!r}, not {' or '.join(expected)}"
    )


def _model_inside(directory: Path) -> Path | None:
    """The newest model that is one or two levels down: in a run directory its result, else its last checkpoint."""
    for pattern in ("*/config.json", "*/*/config.json"):
        found = sorted(directory.glob(pattern), key=lambda path: path.stat().st_mtime)
        if found:
            return found[-1].parent.relative_to(directory)
    return None


def _check_weights(directory: Path, source: str | Path) -> None:
    # Only safetensors: our own directories hold nothing else, and a pickled file would be code from a stranger.
    names = ("model.safetensors", "model.safetensors.index.json", SHARDS)
    if not any((directory / name).exists() for name in names):
        raise CheckpointError(f"{source} has no weights (model.safetensors)")


def _load_model(
    directory: Path, class_name: str, kind: Kind, source: str | Path, dtype: torch.dtype | None
) -> PreTrainedModel:
    model_class: Any = getattr(models, class_name)
    try:
        with quiet_progress(), _without_report():
            model, info = model_class.from_pretrained(
                directory,
                dtype=dtype or "auto",
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except CottentionError:
        raise
    except Exception as error:
        if not is_damage(error) and not isinstance(error, SafetensorError):
            raise
        raise CheckpointError(f"{source} cannot be opened, config or weights are damaged: {one_line(error)}") from error
    if kind == "causal-lm":
        model.generation_config = _own_generation_config(model, source)
    missing = sorted(info["missing_keys"])
    if kind in (
        "encoder",
        "base",
    ):  # a model that was trained on masked tokens alone has no pooler; its tokens are all there
        missing = [key for key in missing if not key.startswith("pooler.")]
    head, remedy = _HEADS.get(kind, ((), ""))
    if any(key.startswith(head) for key in missing):
        raise CheckpointError(f"{source} has no {remedy}")
    if missing:
        raise CheckpointError(f"{source} lacks {len(missing)} of the model's tensors, such as {missing[0]}")
    return model


def _own_generation_config(model: PreTrainedModel, source: str | Path) -> GenerationConfig:
    """The special tokens alone: how a text is written is for whoever asks for it, not for generation_config.json."""
    given: Any = model.generation_config
    tokens = {name: getattr(given, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in tokens.items():
        try:
            check_token_id(name, value, model.config.vocab_size)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"generation_config.json of {source}: {one_line(error)}") from error
    return GenerationConfig(**tokens)


def _load_tokenizer(directory: Path, source: str | Path) -> PreTrainedTokenizerBase:
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
        raise CheckpointError(f"{source} has no tokenizer (tokenizer.json)")
    return open_tokenizer(
        directory,
        lambda: AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False),
        f"{source} has a damaged tokenizer",
    )


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Hold back transformers' progress bars, which stay on the screen for work of a second."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _without_report() -> Iterator[None]:
    """Hold back transformers' table of missing and unexpected tensors: what matters of it is said in one line here."""
    logger = logging.getLogger("transformers.modeling_utils")

    def refuse(_record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(refuse)
    try:
        yield
    finally:
        logger.removeFilter(refuse)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device of this name; None: a GPU where there is one.

    Raises:
        SettingsError: it cannot be used here.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        if "Expected one of" in str(error):  # followed by every kind that torch has a name for
            near = did_you_mean(str(device), ["cpu", "cuda", "mps", "xpu"])
            name = "; did you mean 'cuda'?" if str(device).startswith("gpu") else near
            raise SettingsError(
                f"device {str(device)!r} cannot be used here; there are cpu, cuda, cuda:1 and the like{name}"
            ) from error
        raise SettingsError(f"device {str(device)!r} cannot be used here: {one_line(error)}") from error
