"""Makes `AutoModel.from_pretrained` know our models as soon as both packages are imported, in either order.

transformers may come before or after cottention, or never; importing it for the sake of registration would make
`import cottention` take seconds. So when it is not there yet, a post-import hook (wrapt's) waits for it.

    register_with_transformers()
"""

from __future__ import annotations

import sys
from importlib import import_module

from cottention.logging import get_logger


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


def _register_models(_transformers: object = None) -> None:
    """Register; a transformers that cannot carry our models must stay importable, so that is a warning."""
    try:
        # Missing while cottention.models is itself being imported, and that ends with a registration of its own.
        register = getattr(import_module("cottention.models"), "register_auto_classes", None)
        if register is not None:
            register()
    except ImportError as error:
        get_logger(__name__).warning("cottention's models are not registered with transformers: %s", error)
