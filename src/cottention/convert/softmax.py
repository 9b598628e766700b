"""Turns a stock softmax BERT or GPT-J checkpoint into a cosine model of the same weights, optionally taught on text.

The weights are put into our softmax twin first, by name and strictly, so that what is written with softmax attention
computes what the source does. The cosine model has the same tensors and a norm_const in every layer; it computes
something else, and a short distillation brings it back near the source (see distil.py). With `keep_every` some layers
stay as they are, which makes a hybrid; of a GPT they may become windows of the source's attention (`sliding_window`).
An `output_gate` is added so that it changes nothing until it is trained.

    report = convert_softmax("all-MiniLM-L6-v2", "models/minilm", distillation=DistillationSettings(text=("books/",)))
    print(report.summary())
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention import models
from cottention.convert.assemble import build_model, detect_attention_type, settle_special_tokens
from cottention.convert.configs import Architecture, AttentionType, TranslatedConfig, translate_config
from cottention.convert.directory import HUB_FILES, check_apart, claimed, report_on, write_model
from cottention.convert.distil import DistillationSettings, check_window, distil
from cottention.convert.distil_report import DistillationReport
from cottention.convert.report import ConversionReport
from cottention.convert.tokenizers import read_tokenizer
from cottention.convert.weights import read_weights
from cottention.data.corpus import DEFAULT_CORPUS
from cottention.data.source_files import files_of
from cottention.errors import CheckpointError, SettingsError
from cottention.generation.loading import choose_device
from cottention.generation.source import resolve_directory
from cottention.json_files import read_json_object
from cottention.models.configuration import ATTENTION_TYPES, MOST_LAYERS, check_choice, check_number, check_size
from cottention.models.layer_types import LAYER_TYPES, SLIDING, uniform

_CLASSES = {
    "bert": ("BertForPreTraining", "BertForMaskedLM", "BertModel"),
    "gptj": ("GPTJForCausalLM",),
    "cottention-bert": ("CottentionBertForPreTraining", "CottentionBertForMaskedLM", "CottentionBertModel"),
    "cottention-gpt": ("CottentionGPTForCausalLM",),
}
_SUPPORTED = "BERT (BertForPreTraining, BertForMaskedLM, BertModel) and GPT-J (GPTJForCausalLM)"
# What the nearest relatives have that no config of ours can hold.
_WHY_NOT = {
    "gpt2": "learned positions (wpe), biases in its attention, and a second LayerNorm for a feed-forward part that "
    "reads the attention's output",
    "gpt_neo": "learned positions (wpe), and a second LayerNorm for a feed-forward part that reads the attention's "
    "output",
    "gpt_neox": "biases in its attention, a second LayerNorm, and rotary pairs of another order",
    "roberta": "positions that begin behind the padding token and skip padding, and a head of its own",
    "distilbert": "no token types, and names of its own",
}
# BERT's first files named LayerNorm's parameters as TensorFlow did.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_NUM_LAYERS: dict[Architecture, str] = {"bert": "num_hidden_layers", "gpt": "n_layer"}
# Of a layer: its attention, the weight that its heads leave by, and the setting that says how many there are.
_PARTS: dict[Architecture, tuple[str, str, str]] = {
    "bert": (
        "bert.encoder.layer.{}.attention.self",
        "bert.encoder.layer.{}.attention.output.dense.weight",
        "num_attention_heads",
    ),
    "gpt": ("transformer.h.{}.attn", "transformer.h.{}.attn.out_proj.weight", "n_head"),
}
_BARE_BERT = re.compile(r"(embeddings|encoder|pooler)\.")
_BERT_HEADS = ("cls.predictions.", "cls.seq_relationship.")


def convert_softmax(
    source: str | Path,
    destination: str | Path,
    *,
    attention_type: AttentionType = "cosine",
    norm_const: float = 0.5,
    keep_every: int | None = None,
    sliding_window: int | None = None,
    output_gate: bool = False,
    distillation: DistillationSettings | None = None,
    device: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    show_progress: bool = False,
) -> ConversionReport:
    """Convert a stock BERT or GPT-J checkpoint, or a softmax model of ours, to a directory as training writes them.

    Args:
        source: directory, or OWNER/NAME on the Hugging Face Hub.
        destination: directory to write; appears only when complete.
        attention_type: "cosine", or "softmax" to keep what the source computes.
        norm_const: start of every head's learned exponent, before its sigmoid.
        keep_every: N: layers N, 2 N, 3 N ... keep the attention of the source; None: all become cosine.
        sliding_window: tokens that the kept layers of a GPT see; None: as many as in the source.
        output_gate: whether each layer gets a sigmoid gate of its tokens that does nothing at the start: it is a half
            everywhere, which the output projection doubles. Every output is that of the model without, to the bit.
        distillation: how to teach the cosine model what the source does; None: weights are copied, nothing more.
        device: where to distil; None: a GPU where there is one. The result is on the CPU.
        overwrite: replace a model that is at `destination`.
        revision: branch, tag or commit on the Hub.
        show_progress: show bars on stderr.

    Returns:
        What was read, left out, made anew and taught; also written to conversion.json.

    Raises:
        CheckpointError: `source` is missing, damaged, incomplete, cosine already or of another architecture, or
            `destination` cannot be written.
        SettingsError: a setting makes no sense, alone or for this source.
        DataError: the text of the distillation cannot be used.
    """
    check_choice("attention_type", attention_type, ATTENTION_TYPES)
    check_number("norm_const", norm_const)
    if keep_every is not None:
        check_size("keep_every", keep_every, minimum=2, maximum=MOST_LAYERS)
        if attention_type == "softmax":
            raise SettingsError("keep_every keeps layers beside cosine ones; got attention_type 'softmax'")
    if sliding_window is not None:
        check_size("sliding_window", sliding_window, maximum=2**31)
        if keep_every is None:
            raise SettingsError(
                f"sliding_window is for the layers of keep_every; got {sliding_window} and no keep_every"
            )
    if output_gate and attention_type == "softmax":
        raise SettingsError("output_gate is added to a cosine model; got attention_type 'softmax'")
    if distillation is not None and attention_type == "softmax":
        raise SettingsError("a distillation teaches cosine attention; got attention_type 'softmax'")
    for name in () if distillation is None else (*distillation.text, *distillation.held_out):
        if not name.startswith(DEFAULT_CORPUS):
            files_of(name)  # before hours of other work
    destination = Path(destination).expanduser()
    with claimed(destination, overwrite=overwrite):
        return _converted(
            source,
            destination,
            attention_type,
            norm_const,
            keep_every,
            sliding_window,
            output_gate,
            distillation,
            device,
            overwrite=overwrite,
            revision=revision,
            show_progress=show_progress,
        )


def _converted(
    source: str | Path,
    destination: Path,
    attention_type: AttentionType,
    norm_const: float,
    keep_every: int | None,
    sliding_window: int | None,
    output_gate: bool,
    distillation: DistillationSettings | None,
    device: str | None,
    *,
    overwrite: bool,
    revision: str | None,
    show_progress: bool,
) -> ConversionReport:
    directory = resolve_directory(source, file_patterns=HUB_FILES, revision=revision)
    check_apart(directory, destination)

    translated = _translate(directory)
    mixed = None if attention_type == "softmax" else _mixed(translated, keep_every, sliding_window)
    if output_gate and translated.fields.get("output_gate") is not None:
        raise SettingsError(f"output_gate cannot be added: {directory} has one")
    weights = read_weights(directory)
    if detect_attention_type(weights.tensors) == "cosine":
        raise CheckpointError(
            f"{directory} is cosine already: its weights hold norm_const; `cottention convert official` reads it"
        )
    tensors = _our_names(weights.tensors, translated.architecture)
    model_class = _model_class(translated.architecture, tensors)
    built = build_model(translated, "softmax", tensors, model_class, heads=_heads(translated.architecture))
    has_head = not any(name.startswith(_BERT_HEADS[0]) for name in built.new)
    tokenizer, tokenizer_files = read_tokenizer(
        directory, translated.architecture, vocab_size=translated.fields["vocab_size"]
    )
    model, new, taught = built.model, built.new, None
    if mixed is not None:
        model, made = _cosine_copy(built.model, translated, mixed, norm_const, sliding_window, output_gate)
        new = (*new, *made)
    if distillation is not None:
        if tokenizer is None:
            raise CheckpointError(f"{directory} has no tokenizer files, which a distillation needs")
        check_window(distillation.window, built.model.config)
        model, taught = _taught(
            built.model, model, tokenizer, translated.architecture, distillation, has_head, device, show_progress
        )
    settle_special_tokens(model, tokenizer, attention_type)
    report = report_on(
        model,
        tokenizer,
        translated,
        source=source,
        directory=directory,
        destination=destination,
        files_read=("config.json", *weights.files, *tokenizer_files),
        left_out=built.left_out,
        notes=_notes(built.new, attention_type, taught, mixed, sliding_window),
        new=new,
        distillation=taught,
    )
    write_model(destination, model, tokenizer, report, overwrite=overwrite)
    return report


def _translate(directory: Path) -> TranslatedConfig:
    path = directory / "config.json"
    config = read_json_object(path)
    model_type = config.get("model_type")
    if str(model_type).startswith("cottention-") and config.get("attention_type", "cosine") == "cosine":
        raise CheckpointError(f"{directory} is cosine already (attention_type in config.json): nothing to convert")
    if not isinstance(model_type, str) or model_type not in _CLASSES:
        why = f", which has {_WHY_NOT[str(model_type)]}" if str(model_type) in _WHY_NOT else ""
        raise CheckpointError(f"{path}: cannot carry over a model of type {model_type!r}{why}; supported: {_SUPPORTED}")
    return translate_config(directory, _CLASSES)


def _our_names(tensors: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Stock names are ours, but for a bare BertModel's, which lack their beginning, and those of BERT's first files."""
    if architecture == "gpt":
        return tensors
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for old, current in _OLD_NAMES.items():
            name = name.replace(old, current)
        renamed[f"bert.{name}" if _BARE_BERT.match(name) else name] = tensor
    return renamed


def _model_class(architecture: Architecture, tensors: dict[str, Tensor]) -> type[PreTrainedModel]:
    """The class that takes up every tensor: what config.json names may be a part of what the file holds, or more."""
    if architecture == "gpt":
        return models.CottentionGPTForCausalLM
    if any(name.startswith(("bert.pooler.", _BERT_HEADS[1])) for name in tensors):
        return models.CottentionBertForPreTraining
    return models.CottentionBertForMaskedLM


def _heads(architecture: Architecture) -> tuple[str, ...]:
    """Heads that a checkpoint may lack; a GPT without its head generates nothing, so it may not."""
    return _BERT_HEADS if architecture == "bert" else ()


def _mixed(translated: TranslatedConfig, keep_every: int | None, sliding_window: int | None) -> list[str]:
    """The layers of the result: cosine, or as they are in the source, or windows of that."""
    num_layers = translated.fields[_NUM_LAYERS[translated.architecture]]
    if keep_every is not None and keep_every > num_layers:
        raise SettingsError(f"keep_every must be at most the source's number of layers, {num_layers}; got {keep_every}")
    if sliding_window is not None and translated.architecture == "bert":
        raise SettingsError(f"sliding_window is for GPT: a BERT's layers have no windows; got {sliding_window}")
    own = translated.fields.get("layer_types") or uniform("softmax", num_layers)
    if sliding_window is not None:
        own = [SLIDING] * num_layers
    kept = [keep_every is not None and layer % keep_every == 0 for layer in range(1, num_layers + 1)]
    return [name if keeps else LAYER_TYPES["cosine"] for name, keeps in zip(own, kept, strict=True)]


def _cosine_copy(
    source: PreTrainedModel,
    translated: TranslatedConfig,
    mixed: list[str],
    norm_const: float,
    sliding_window: int | None,
    output_gate: bool,
) -> tuple[PreTrainedModel, list[str]]:
    """The cosine model of the same tensors (not copies, unless a gate doubles them), and the names of its own."""
    attention, out, num_heads = _PARTS[translated.architecture]
    shape = (1, translated.fields[num_heads], 1, 1)
    made = {
        f"{attention.format(layer)}.norm_const": torch.full(shape, float(norm_const))
        for layer, name in enumerate(mixed)
        if name == LAYER_TYPES["cosine"]
    }
    fields = {**translated.fields, "norm_const_init": norm_const, "layer_types": mixed}
    if SLIDING not in mixed:
        fields.pop("sliding_window", None)
    elif sliding_window is not None:
        fields["sliding_window"] = sliding_window
    tensors = {name: tensor.detach() for name, tensor in source.state_dict().items()}
    if output_gate:
        fields["output_gate"] = "sigmoid"
        for layer in range(len(mixed)):
            projection = tensors[out.format(layer)]
            tensors[out.format(layer)] = 2 * projection  # exactly: a power of two
            gate = f"{attention.format(layer)}.gate_proj"
            made[f"{gate}.weight"] = torch.zeros_like(projection).T.contiguous()
            made[f"{gate}.bias"] = projection.new_zeros(projection.shape[1])
    built = build_model(replace(translated, fields=fields), "cosine", {**tensors, **made}, type(source))
    return built.model, list(made)


def _taught(
    source: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    architecture: Architecture,
    settings: DistillationSettings,
    has_head: bool,
    device: str | None,
    show_progress: bool,
) -> tuple[PreTrainedModel, DistillationReport]:
    """Distil in float32, on the device asked for; the result is on the CPU, each tensor in the type it had."""
    target = choose_device(device)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    # The stub of Module.to loses torch.device here.
    teacher, student = (one.to(target, torch.float32) for one in (source, copy.deepcopy(model)))  # pyright: ignore
    report = distil(teacher, student, tokenizer, architecture, settings, has_head=has_head, show_progress=show_progress)
    student.cpu()
    for name, parameter in student.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return student, report


def _notes(
    new: tuple[str, ...],
    attention_type: AttentionType,
    taught: DistillationReport | None,
    mixed: list[str] | None,
    sliding_window: int | None,
) -> list[str]:
    notes = []
    within = "" if sliding_window is None else f", within {sliding_window} tokens"
    if kept := [str(layer) for layer, name in enumerate(mixed or (), 1) if name != LAYER_TYPES["cosine"]]:
        notes.append(f"layers {', '.join(kept)} of {len(mixed or ())} keep the attention of the source{within}")
    for head, what in zip(_BERT_HEADS, ("masked-token", "next-sentence"), strict=True):
        if any(name.startswith(head) for name in new):
            notes.append(f"the source has no {what} head: one was initialised and means nothing until it is trained")
    if attention_type == "cosine" and (taught is None or taught.after is None):
        notes.append("softmax weights under cosine attention compute something else: distil or train before use")
    return notes
