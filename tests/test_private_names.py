"""What we use of other libraries that they may rename without a word: private names, and what we override.

A renamed hook is never called again and nothing says so: the model or trainer then works by the library's default. So
each name stands in a table here, must exist in the installed version, and be called as ours is; and what the code uses
without a row here fails by name, too.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import cottention

_SOURCE = Path(cottention.__file__).parent

# Library's class -> what subclasses of ours replace of it.
_OVERRIDDEN = {
    "jsonargparse.ArgumentParser": ["parse_args"],
    "jsonargparse.DefaultHelpFormatter": ["_fill_text", "_get_help_string"],
    "lm_eval.models.huggingface.HFLM": ["_encode_pair", "tok_batch_encode"],
    "transformers.Cache": ["batch_repeat_interleave", "batch_select_indices", "reorder_cache", "reset"],
    "transformers.cache_utils.CacheLayerMixin": [
        "get_mask_sizes",
        "get_max_length|get_max_cache_shape",
        "get_seq_length",
        "is_compileable",
        "lazy_initialization",
        "offload",
        "prefetch",
        "reorder_cache",
        "reset",
        "supports_early_init",
        "update",
    ],
    "transformers.PreTrainedConfig": [
        "attribute_map",
        "from_dict",
        "get_config_dict",
        "model_type",
        "register_for_auto_class",
        "to_dict",
        "to_diff_dict",
        "to_json_file",
    ],
    "transformers.GenerationMixin": [
        "_prepare_cache_for_generation",
        "generate",
        "init_continuous_batching",
        "prepare_inputs_for_generation",
    ],
    "transformers.PreTrainedModel": [
        "_can_set_attn_implementation",
        "_check_and_adjust_attn_implementation",
        "_init_weights",
        "_is_stateful",
        "_keep_in_fp32_modules_strict",
        "_keys_to_ignore_on_load_unexpected",
        "_no_split_modules",
        "_skip_keys_device_placement",
        "_tied_weights_keys",
        "base_model_prefix",
        "config_class",
        "from_pretrained",
        "get_input_embeddings",
        "get_output_embeddings",
        "register_for_auto_class",
        "save_pretrained",
        "set_input_embeddings",
        "set_output_embeddings",
        "supports_gradient_checkpointing",
    ],
    "transformers.TrainerCallback": ["on_evaluate", "on_log", "on_step_end", "on_train_begin", "on_train_end"],
}

# Library's class or module -> what we take from it: private names, and public ones that have no promise.
_USED = {
    "argparse": ["_HelpAction", "_SubParsersAction"],
    "argparse.ArgumentParser": ["_actions", "_option_string_actions"],
    "datasets.Dataset": ["_fingerprint"],
    "jsonargparse": ["ActionConfigFile"],
    "torch": ["_C", "_assert_async", "_dynamo", "_higher_order_ops"],
    "torch._C": ["_AutoDispatchBelowAutograd", "_autograd", "_are_functorch_transforms_active", "_is_tracing"],
    "torch._C._autograd": ["_get_current_graph_task_keep_graph"],
    "torch._dynamo.config": ["capture_dynamic_output_shape_ops"],
    "torch.autograd.forward_ad": ["_current_level"],
    "torch.ops.aten": [
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ],
    "torch.ops.mkldnn": ["_is_mkldnn_bf16_supported"],
    "torch.utils": ["_pytree", "_python_dispatch"],
    "torch.nn.Module": [
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_parameters",
    ],
    "torch.nn.modules.module": ["_has_any_global_hook"],
    "transformers.modeling_layers": ["GradientCheckpointingLayer"],
    "transformers.utils.import_utils": ["is_tracing"],
    "transformers.PreTrainedModel": [
        "activation_checkpointing_enable|gradient_checkpointing_enable",
    ],
    "transformers.models.auto.configuration_auto": ["AutoConfig"],
    "transformers.models.auto.modeling_auto": ["AutoModel", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"],
}

# Module -> names that it looks for in what we hand it.
_LOOKED_FOR = {
    "transformers.trainer": ["keys_to_ignore_at_inference"],
}

# Private by name, promised by Python.
_STANDARD = {"_asdict", "_field_defaults", "_fields", "_exit", "_getframe"}

_LIBRARIES = ("accelerate", "datasets", "jsonargparse", "lm_eval", "tokenizers", "torch", "transformers")


def _resolve(path: str) -> Any:
    """The module, class or function behind a dotted path."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


def _has(owner: Any, name: str) -> bool:
    """Whether it is an attribute, of instances too: one that a class of the family declares or gives itself."""
    if hasattr(owner, name):
        return True
    given = re.compile(rf"(\bself\.|^    ){name}\b *[:=]", re.MULTILINE)
    return inspect.isclass(owner) and any(given.search(_source(base)) for base in inspect.getmro(owner))


@cache
def _source(of: Any) -> str:
    try:
        return inspect.getsource(of)
    except (OSError, TypeError):
        return ""  # compiled, or a builtin


@cache
def _all_words() -> set[str]:
    return {word for path in _SOURCE.rglob("*.py") for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}


@cache
def _files() -> dict[str, ast.Module]:
    """Our source, parsed, by the module's name."""
    paths = [path for path in sorted(_SOURCE.rglob("*.py")) if path.name != "__main__.py"]
    return {_module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def _module_name(path: Path) -> str:
    return ".".join(("cottention", *path.relative_to(_SOURCE).with_suffix("").parts)).removesuffix(".__init__")


@cache
def _overrides() -> list[tuple[type, type, str]]:
    """(our class, the library's class, name) of everything that ours replaces of theirs."""
    found = []
    for module, tree in _files().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.bases:
                ours = getattr(importlib.import_module(module), node.name)
                theirs = [base for base in inspect.getmro(ours) if base.__module__.partition(".")[0] in _LIBRARIES]
                for name in sorted(_given_names(node)):
                    owner = next((base for base in theirs if _is_replaced(base, name)), None)
                    if owner is not None:
                        found.append((ours, owner, name))
    return found


def _given_names(node: ast.ClassDef) -> set[str]:
    """Methods and class attributes of a class, and private attributes that its methods set."""
    names = set()
    for part in node.body:
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(part.name)
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.value is not None:
            names.add(part.target.id)
        elif isinstance(part, ast.Assign):
            names.update(target.id for target in part.targets if isinstance(target, ast.Name))
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and part.attr.startswith("_"):
            names.add(part.attr)
    return {name for name in names if not name.startswith("__")}


def _is_replaced(base: type, name: str) -> bool:
    """Whether a name given by a subclass is the library's; torch's public ones are there to be given."""
    if name.startswith("_"):
        return _has(base, name)
    return hasattr(base, name) and not base.__module__.startswith("torch.") and not hasattr(torch.nn.Module, name)


def _private_uses() -> Iterator[tuple[str, str]]:
    """(module, name) of private names in our source that nothing in it defines."""
    nodes = [(module, node) for module, tree in _files().items() for node in ast.walk(tree)]
    modules = {part for module in _files() for part in module.split(".")}
    defined = modules.union(*(_defined(node) for _, node in nodes))
    for module, node in nodes:
        used = []
        if isinstance(node, ast.Attribute):
            used = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            used = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        for name in used:
            if name.startswith("_") and not name.startswith("__") and name not in defined:
                yield module, name


def _defined(node: ast.AST) -> set[str]:
    """Names that a piece of code gives a meaning: a module's, a class's, an argument, an own attribute."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.arg):
        return {node.arg}
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return {node.id}
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    return set()


def _rows(*tables: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(owner, name) for table in tables for owner, names in table.items() for name in names]


@pytest.mark.parametrize(("owner", "name"), _rows(_OVERRIDDEN, _USED))
def test_the_installed_version_has_the_name(owner: str, name: str):
    assert any(_has(_resolve(owner), either) for either in name.split("|"))


@pytest.mark.parametrize(("module", "name"), _rows(_LOOKED_FOR))
def test_the_installed_version_looks_for_the_name(module: str, name: str):
    assert f'"{name}"' in _source(_resolve(module))


@pytest.mark.parametrize("name", [name for _, name in _rows(_OVERRIDDEN, _USED, _LOOKED_FOR)])
def test_a_name_of_the_tables_is_still_used(name: str):
    assert set(name.split("|")) <= _all_words()


def test_what_we_override_stands_in_the_table():
    rows = [(_resolve(owner), name.split("|")) for owner, name in _rows(_OVERRIDDEN)]
    looked_for = {name for _, name in _rows(_LOOKED_FOR)}
    missing = [
        f"{ours.__module__}.{ours.__name__}.{name} of {owner.__module__}.{owner.__name__}"
        for ours, owner, name in _overrides()
        if name not in looked_for and not any(issubclass(ours, base) and name in names for base, names in rows)
    ]
    assert not missing


def test_private_names_that_we_use_stand_in_the_tables():
    known = {either for _, name in _rows(_OVERRIDDEN, _USED) for either in name.split("|")}
    assert not [use for use in _private_uses() if use[1] not in known | _STANDARD]


def test_an_override_takes_what_the_overridden_takes():
    wrong = []
    for ours, owner, name in _overrides():
        mine, theirs = vars(ours).get(name), getattr(owner, name, None)
        if inspect.isfunction(mine) and inspect.isfunction(theirs):
            wrong += [f"{ours.__name__}.{name}: {reason}" for reason in _misfits(mine, theirs)]
    assert not wrong


def _misfits(mine: Any, theirs: Any) -> Iterator[str]:
    """What a caller of theirs may pass that mine refuses, and what mine needs and no caller passes."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ours, other = inspect.signature(mine).parameters, inspect.signature(theirs).parameters
    takes_all = any(parameter.kind in variable for parameter in ours.values())
    gives_more = any(parameter.kind in variable for parameter in other.values())
    for name, parameter in other.items():
        if name not in ours and parameter.kind not in variable and not takes_all:
            yield f"does not take {name}"
    for name, parameter in ours.items():
        needed = parameter.kind not in variable and parameter.default is parameter.empty
        if needed and name not in other and not gives_more:
            yield f"needs {name}"
