"""Makes transformers' Auto classes and PEFT know our models as soon as both packages are imported, in either order.

They may come before or after cottention, or never; importing transformers for the sake of registration would make
`import cottention` take seconds. So when one is not there yet, a post-import hook (wrapt's) waits for it.

    register_with_transformers()
    register_with_peft()
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from cottention.logging import get_logger

_PEFT_TABLES = "peft.utils.constants"
# Our modules have the stock models' names, so what PEFT adapts in those holds for ours.
_STOCK_TWINS = {"cottention-bert": "bert", "cottention-gpt": "gptj"}


def register_with_transformers() -> None:
    """Register the models now if transformers is imported, otherwise when it will be. Importing nothing is fine too."""
    if "transformers" in sys.modules:
        _register_models()
        return
    try:
        from wrapt import register_post_import_hook
    except ImportError:
        # The operation needs torch and jaxtyping alone; importing cottention.models registers them as well.
        return
    register_post_import_hook(_register_models, "transformers")


def register_with_peft() -> None:
    """Have PEFT choose `target_modules` for our models by itself, as it does for the stock ones."""
    if _PEFT_TABLES in sys.modules:
        _register_targets(sys.modules[_PEFT_TABLES])
        return
    try:
        from wrapt import register_post_import_hook
    except ImportError:
        return
    register_post_import_hook(_register_targets, _PEFT_TABLES)


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
