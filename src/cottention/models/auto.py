"""Makes transformers' Auto classes know our models.

Importing `transformers` loads almost nothing, and a registration should not change that. So each Auto table gets our
entries when transformers loads that table, by post-import hooks: configs with the config table, models with the model
table, tokenizers with theirs. Either side may be half imported when the other one arrives (our modelling imports
transformers', whose table imports ours), so a module's classes are registered when that module has been imported to its
end; what cannot be imported before that is tried again then.

A process that never imports cottention finds the same classes through `auto_map`, which config.json carries, and a
module of one line beside it (`remote_module`): with trust_remote_code=True, transformers imports that module.

    register_auto_classes()      # done by `import cottention`; again does no harm
"""

from __future__ import annotations

import sys
from importlib import import_module

from cottention.logging import get_logger

_CONFIG_TABLE = "transformers.models.auto.configuration_auto"
_MODEL_TABLE = "transformers.models.auto.modeling_auto"
_TOKENIZER_TABLE = "transformers.models.auto.tokenization_auto"
_HERE = "cottention.models"
# Which class goes under which Auto class, by the module that defines it and the table that takes it.
_CLASSES = {
    _CONFIG_TABLE: {
        f"{_HERE}.bert.configuration_bert": {"AutoConfig": "CottentionBertConfig"},
        f"{_HERE}.gpt.configuration_gpt": {"AutoConfig": "CottentionGPTConfig"},
    },
    _MODEL_TABLE: {
        f"{_HERE}.bert.modeling_bert": {
            "AutoModel": "CottentionBertModel",
            "AutoModelForTextEncoding": "CottentionBertModel",
            "AutoModelForPreTraining": "CottentionBertForPreTraining",
            "AutoModelForMaskedLM": "CottentionBertForMaskedLM",
        },
        f"{_HERE}.bert.tasks_bert": {
            "AutoModelForSequenceClassification": "CottentionBertForSequenceClassification",
            "AutoModelForTokenClassification": "CottentionBertForTokenClassification",
            "AutoModelForQuestionAnswering": "CottentionBertForQuestionAnswering",
            "AutoModelForMultipleChoice": "CottentionBertForMultipleChoice",
            "AutoModelForNextSentencePrediction": "CottentionBertForNextSentencePrediction",
        },
        f"{_HERE}.gpt.modeling_gpt": {
            "AutoModel": "CottentionGPTModel",
            "AutoModelForPreTraining": "CottentionGPTForCausalLM",
            "AutoModelForCausalLM": "CottentionGPTForCausalLM",
        },
        f"{_HERE}.gpt.tasks_gpt": {
            "AutoModelForSequenceClassification": "CottentionGPTForSequenceClassification",
            "AutoModelForTokenClassification": "CottentionGPTForTokenClassification",
            "AutoModelForQuestionAnswering": "CottentionGPTForQuestionAnswering",
        },
    },
    _TOKENIZER_TABLE: {f"{_HERE}.tokenizers": {"AutoTokenizer": "ModelTokenizer"}},
}
_CONFIGS = _CLASSES[_CONFIG_TABLE]
# The file beside config.json that `auto_map` names, and what it says to whoever looks before trusting it.
REMOTE_MODULE = "modeling_cottention"
_REMOTE_TEXT = """\
# This model's classes come with the package cottention (pip install cottention); no other code is in this directory.
from cottention.models import {names}
"""
# transformers' module that our modelling takes its layers from; importing it loads the table of models on the way.
_LAYERS = "transformers.modeling_layers"
_waiting: list[tuple[str, str]] = []
_hooked = False


def auto_map(config_module: str) -> dict[str, str]:
    """Which class each Auto class takes for a family, as config.json says it.

    Args:
        config_module: the module that defines the family's config; of another package, there is no family.
    """
    family = config_module.rpartition(".")[0]
    rows = [row for modules in _CLASSES.values() for row in modules.items()]
    named = {
        auto: name for module, names in rows if module.rpartition(".")[0] == family for auto, name in names.items()
    }
    return {auto: f"{REMOTE_MODULE}.{name}" for auto, name in named.items()}


def remote_module(config_module: str) -> str:
    """The text of the module that `auto_map` names: it imports the family's classes from this package."""
    names = {reference.removeprefix(f"{REMOTE_MODULE}.") for reference in auto_map(config_module).values()}
    return _REMOTE_TEXT.format(names=", ".join(sorted(names)))


def register_auto_classes() -> None:
    """Register our configs and models with AutoConfig, AutoModel, AutoModelForCausalLM and their like.

    What transformers has not loaded yet is registered when it does. Calling it again does no harm.
    """
    install_hooks()
    if not _hooked:
        # Without hooks everything is imported at once: slower, but as complete.
        for table in _CLASSES:
            import_module(table)
            _table_is_there(table)


def install_hooks() -> None:
    """Have classes registered once their module and their table are imported; does nothing without wrapt.

    It must run before the first of our modules is imported, so `cottention.models` calls it.
    """
    global _hooked
    if _hooked:
        return
    try:
        from wrapt import register_post_import_hook
    except ImportError:
        return
    _hooked = True
    for table, modules in _CLASSES.items():
        for module in modules:
            register_post_import_hook(lambda _, table=table, module=module: _module_is_there(table, module), module)
        register_post_import_hook(lambda _, table=table: _table_is_there(table), table)
    register_post_import_hook(lambda _: _try_again(), _LAYERS)


def _table_is_there(table: str) -> None:
    for module in _CLASSES[table]:
        _import_and_register(table, module)


def _import_and_register(table: str, module: str) -> None:
    # A module that is half imported just now registers itself at its end.
    if module not in sys.modules:
        try:
            import_module(module)
        except ImportError as error:
            if any(map(_is_half_imported, (_LAYERS, *(ours for modules in _CLASSES.values() for ours in modules)))):
                _waiting.append((table, module))
            else:
                # Another transformers than ours, beside the operation alone, must stay usable.
                get_logger(__name__).warning("%s is not registered with transformers: %s", module, error)
            return
    _register(table, module)


def _is_half_imported(name: str) -> bool:
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)


def _module_is_there(table: str, module: str) -> None:
    _register(table, module)
    _try_again()


def _try_again() -> None:
    waiting, _waiting[:] = tuple(_waiting), []
    for table, module in waiting:
        _import_and_register(table, module)


def _register(table: str, module: str) -> None:
    """Register what this module defines, as far as both sides are imported."""
    for auto_name, class_name in _CLASSES[table][module].items():
        auto = getattr(sys.modules.get(table), auto_name, None)
        ours = getattr(sys.modules.get(module), class_name, None)
        if auto is None or ours is None:
            continue
        if table == _TOKENIZER_TABLE:
            for config_module, names in _CONFIGS.items():
                config_class = getattr(import_module(config_module), names["AutoConfig"])
                auto.register(config_class, tokenizer_class=ours, exist_ok=True)
        else:
            auto.register(ours.model_type if table == _CONFIG_TABLE else ours.config_class, ours, exist_ok=True)
        if auto_name == "AutoModelForCausalLM":
            # By this name the Trainer knows whose labels to shift when it smooths them; unshifted, they teach copying.
            sys.modules[table].MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(ours.config_class.model_type, class_name)
