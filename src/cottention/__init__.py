"""Linear transformers with cosine attention: O(T) training, decoding at constant memory.

The public names below are imported on first use, so `import cottention` itself loads neither torch nor transformers
(`cottention --help` stays quick) and the operation works where only torch and jaxtyping are installed.

    from cottention import cosine_attention, CosineAttention
"""

from __future__ import annotations

from importlib import import_module
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
_SUBPACKAGES = frozenset({"ops", "layers", "models", "convert", "data", "training", "evaluation", "generation"})

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
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})


_register.register_with_transformers()
_register.register_with_peft()
