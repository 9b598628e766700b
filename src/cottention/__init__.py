"""Linear transformers with cosine attention: O(T) training, decoding at constant memory.

The public names below are imported on first use, so `import cottention` itself loads neither torch nor transformers
(`cottention --help` stays quick) and the operation works where only torch and jaxtyping are installed.

    from cottention import cosine_attention, CosineAttention
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from opcode import opmap
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cottention import _register

if TYPE_CHECKING:
    from cottention.layers import CosineAttention as CosineAttention
    from cottention.layers import SoftmaxAttention as SoftmaxAttention
    from cottention.ops import CosineState as CosineState
    from cottention.ops import cosine_attention as cosine_attention
    from cottention.ops import cosine_attention_step as cosine_attention_step

__version__ = "0.1.0"

_HOME_OF = {
    "cosine_attention": "cottention.ops",
    "cosine_attention_step": "cottention.ops",
    "CosineState": "cottention.ops",
    "CosineAttention": "cottention.layers",
    "SoftmaxAttention": "cottention.layers",
}
_SUBPACKAGES = frozenset(
    {"ops", "layers", "integrations", "models", "convert", "data", "training", "evaluation", "generation"}
)

__all__ = [
    "CosineAttention",
    "CosineState",
    "SoftmaxAttention",
    "__version__",
    "cosine_attention",
    "cosine_attention_step",
]


def __getattr__(name: str) -> Any:
    """Import a public name, or a subpackage, when it is first used (PEP 562)."""
    if name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
    elif name in _SUBPACKAGES:
        value = import_module(f"{__name__}.{name}")
    else:
        home = None if name.startswith("_") else _home_of(name)
        where = f"; it is in {__name__}.{home}" if home else ""
        # Behind `from cottention import NAME` Python drops the text of an AttributeError.
        error = ImportError if where and _is_import(sys._getframe(1)) else AttributeError
        raise error(f"module {__name__!r} has no attribute {name!r}{where}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, *_SUBPACKAGES})


def _home_of(name: str) -> str | None:
    """The subpackage whose __all__ has this name, without importing any."""
    return next((subpackage for subpackage, names in _public_names().items() if f'"{name}"' in names), None)


@cache  # libraries that resolve annotations ask for a name of typing's a hundred times
def _public_names() -> dict[str, str]:
    """Subpackage -> what its __init__ says from __all__ on."""
    files = {name: Path(__file__).parent / name / "__init__.py" for name in sorted(_SUBPACKAGES)}
    return {name: file.read_text(encoding="utf-8").partition("__all__")[2] for name, file in files.items()}


def _is_import(caller: FrameType) -> bool:
    return caller.f_code.co_code[caller.f_lasti] == opmap["IMPORT_FROM"]


_register.register_with_transformers()
_register.register_with_peft()
