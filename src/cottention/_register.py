"""Makes transformers' Auto classes and PEFT know our models as soon as both packages are imported, in either order.

They may come before or after cottention, or never; importing transformers for the sake of registration would make
`import cottention` take seconds. So when one is not there yet, a post-import hook (wrapt's) waits for it.

    register_with_transformers()
    register_with_peft()
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from cottention.logging import get_logger

_TRANSFORMERS = "transformers"
_PEFT_TABLES = "peft.utils.constants"
# Our modules have the stock models' names, so what PEFT adapts in those holds for ours.
_STOCK_TWINS = {"cottention-bert": "bert", "cottention-gpt": "gptj"}
_AWAITED: dict[str, Callable[[Any], None]] = {}


def register_with_transformers() -> None:
    """Register the models now if transformers is imported, otherwise when it will be. Importing nothing is fine too."""
    if _TRANSFORMERS in sys.modules:
        _register_models()
    else:
        _await(_TRANSFORMERS, _register_models)


def register_with_peft() -> None:
    """Have PEFT choose `target_modules` for our models by itself, as it does for the stock ones."""
    if _PEFT_TABLES in sys.modules:
        _register_targets(sys.modules[_PEFT_TABLES])
    else:
        _await(_PEFT_TABLES, _register_targets)


def _await(name: str, register: Callable[[Any], None]) -> None:
    if not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
    _AWAITED[name] = register


class _Waiting(MetaPathFinder):
    """Loads wrapt when the first awaited module is looked for: until then nobody pays for its import."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Leave every module to the finders behind, the awaited ones to those that wrapt has put before them."""
        if name not in _AWAITED:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        try:
            from wrapt import register_post_import_hook
        except ImportError:
            # The operation needs torch and jaxtyping alone; importing cottention.models registers them as well.
            return None
        for awaited, register in _AWAITED.items():
            register_post_import_hook(register, awaited)
        specs = (finder.find_spec(name, path, target) for finder in list(sys.meta_path))
        return next((spec for spec in specs if spec is not None), None)


def _register_targets(constants: Any) -> None:
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            for ours, stock in _STOCK_TWINS.items():
                if stock in table:
                    table.setdefault(ours, table[stock])


def _register_models(_transformers: object = None) -> None:
    """Register; a transformers that cannot carry our models must stay importable, so that is a warning."""
    try:
        # Missing while cottention.models is itself being imported, and that ends with a registration of its own.
        register = getattr(import_module("cottention.models"), "register_auto_classes", None)
        if register is not None:
            register()
    except ImportError as error:
        get_logger(__name__).warning("cottention's models are not registered with transformers: %s", error)
