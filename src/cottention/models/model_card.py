"""A model directory's README.md, written from what is in it and from a run's figures; and the directory on the Hub.

Nothing in a card is written by hand: sizes are read from config.json and the weights, settings come from the recipe,
scores from the run. A score that is no finite number is shown, and left out of the metadata that the Hub reads.

    write_model_card("runs/mine/model", recipe=asdict(recipe), metrics={"val_ppl": 21.4}, data="sotu")
    push_model("runs/mine/model", "me/my-model", private=True)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from cottention.errors import CheckpointError
from cottention.files import one_line, write_text
from cottention.models.auto import REMOTE_MODULE
from cottention.models.layer_types import TYPE_WORDS, is_uniform

_KINDS = {
    "cottention-gpt": ("text-generation", "GPT", "AutoModelForCausalLM"),
    "cottention-bert": ("fill-mask", "BERT", "AutoModelForMaskedLM"),
}
# Of a fine-tuned model, by the end of its class's name.
_HEADS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "Model": "feature-extraction",
}
_SIZES = {
    "layers": ("n_layer", "num_hidden_layers"),
    "width": ("n_embd", "hidden_size"),
    "heads": ("n_head", "num_attention_heads"),
    "positions in training": ("n_positions", "max_position_embeddings"),
    "vocabulary": ("vocab_size",),
}
_UPLOADED = ("*.json", "*.safetensors", "*.txt", "README.md", f"{REMOTE_MODULE}.py")


def write_model_card(
    model_dir: str | Path,
    *,
    metrics: Mapping[str, Any],
    recipe: Mapping[str, Any] | None = None,
    name: str | None = None,
    path: str | None = None,
    data: str | None = None,
    license: str | None = None,  # noqa: A002  # the Hub's word
    language: str | None = None,
) -> Path:
    """Write README.md into a model directory, in place of one that is there.

    Args:
        model_dir: a directory of `save_pretrained`, with safetensors.
        metrics: the run's figures by name, such as the last line of its metrics.jsonl; what is no number is left out.
        recipe: the run's settings by section, as `dataclasses.asdict` makes of a recipe.
        name: the model's name; None: that of the directory, or of the run that it is in.
        path: what the example in the card loads, "." for the card's own directory, which may be moved; None: the name,
            as behind an upload.
        data: what the figures were measured on.
        license: of the weights, as the Hub spells it ("mit").
        language: of the text ("en").

    Returns:
        The file.

    Raises:
        CheckpointError: it is no model directory of ours.
    """
    directory = Path(model_dir).expanduser()
    config = _config_of(directory)
    pipeline_tag, auto_class = _use(config)
    name = name or (directory.resolve().parent.name if directory.name == "model" else directory.resolve().name)
    figures = {key: value for key, value in metrics.items() if _is_number(value)}
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type="text",
            dataset_name=data or "held-out text",
            metric_type=key,
            metric_name=key,
            metric_value=value,
        )
        for key, value in figures.items()
        if math.isfinite(value)
    ]
    card = ModelCardData(
        library_name="cottention",
        pipeline_tag=pipeline_tag,
        tags=["cottention", f"{config['attention_type']}-attention"],
        model_name=name,
        eval_results=results or None,
        license=license,
        language=language,
    )
    body = "\n".join(_body(name, path or name, auto_class, directory, config, figures, recipe, data, license))
    text = str(ModelCard(f"---\n{card.to_yaml()}\n---\n\n{body}"))
    write_text(directory / "README.md", text)
    return directory / "README.md"


def push_model(model_dir: str | Path, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """Upload a model directory, its card among it, to the Hugging Face Hub.

    Args:
        model_dir: a directory of `save_pretrained`; only config, weights, tokenizer, card and the module that
            imports our classes are uploaded.
        repo_id: OWNER/NAME; made where it does not exist.
        private: whether a new repository is private.
        token: an access token; None: the one that is logged in.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: it is no model directory of ours, or the Hub refuses.
    """
    directory = Path(model_dir).expanduser()
    _config_of(directory)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=directory, allow_patterns=list(_UPLOADED), commit_message="Upload model"
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(f"cannot upload {model_dir} as {repo_id}: {one_line(error)}") from error
    return str(commit.commit_url)


def _config_of(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} is not a model directory: its config.json cannot be read") from error
    if not isinstance(config, dict) or config.get("model_type") not in _KINDS:
        raise CheckpointError(f"{directory} must hold one of our models ({', '.join(_KINDS)})")
    return {"attention_type": "cosine", **config}


def _body(
    name: str,
    path: str,
    auto_class: str,
    directory: Path,
    config: Mapping[str, Any],
    figures: Mapping[str, float],
    recipe: Mapping[str, Any] | None,
    data: str | None,
    license_name: str | None,
) -> Iterator[str]:
    kind = _KINDS[config["model_type"]][1]
    yield f"# {name}\n"
    yield f"A {kind} with {_attention(config)} attention, trained with cottention.\n"
    yield "| | |\n|---|---|"
    yield f"| parameters | {_num_parameters(directory):,} |"
    for label, keys in _SIZES.items():
        value = next((config[key] for key in keys if key in config), None)
        if value is not None:
            yield f"| {label} | {value:,} |"
    if license_name is not None:
        yield f"| license of the weights | {license_name} |"
    yield "\n## Use\n\n```python\nimport cottention  # makes the model known to transformers"
    yield f"from transformers import {auto_class}, AutoTokenizer\n"
    where = "  # in this directory; from elsewhere its path" if path == "." else ""
    yield f'model = {auto_class}.from_pretrained("{path}"){where}'
    yield f'tokenizer = AutoTokenizer.from_pretrained("{path}")\n```'
    if "auto_map" in config:
        yield "\nTools with a process of their own open it with trust_remote_code=True, where cottention is installed."
    if figures:
        yield f"\n## Figures\n\nMeasured on {data or 'held-out text'}.\n\n| | |\n|---|---|"
        for key, value in figures.items():
            yield f"| {key} | {f'{value:,}' if isinstance(value, int) else f'{value:.6g}'} |"
    if recipe:
        settings = yaml.safe_dump(json.loads(json.dumps(recipe, default=str)), sort_keys=False, allow_unicode=True)
        yield f"\n## Training\n\n```yaml\n{settings.rstrip()}\n```"
    yield ""


def _use(config: Mapping[str, Any]) -> tuple[str, str]:
    """What the Hub calls the model's task, and the class that opens it with its head."""
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    for ending, task in _HEADS.items():
        if name.endswith(ending):
            return task, f"Auto{'' if ending == 'Model' else 'ModelFor'}{ending.removeprefix('For')}"
    task, _, auto_class = _KINDS[config["model_type"]]
    return task, auto_class


def _attention(config: Mapping[str, Any]) -> str:
    """The kind of attention in words, of a hybrid its kinds with the layers that have them."""
    layer_types = config.get("layer_types")
    if not isinstance(layer_types, list) or is_uniform(layer_types):
        return str(config["attention_type"])
    counts = {word: layer_types.count(name) for name, word in TYPE_WORDS.items() if name in layer_types}
    return " and ".join(f"{word} ({count} of {len(layer_types)} layers)" for word, count in counts.items())


def _num_parameters(directory: Path) -> int:
    """Numbers in the weights; a head that shares the embedding's matrix is in there once."""
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} has no weights (model.safetensors)")
    total = 0
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:  # pyright: ignore[reportArgumentType]
                total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory} has damaged weights: {path.name} cannot be read") from error
    return total


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
