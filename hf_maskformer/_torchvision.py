"""Treats a torchvision that is installed but does not import, as is common beside CPU builds of torch, as absent."""

import logging
import sys

logger = logging.getLogger(__name__)


def hide_broken_torchvision() -> None:
    """Blocks torchvision in this process if it does not import, as transformers would fail with it on every image.

    A working or a missing torchvision is left alone. Call it before anything of transformers that handles images is
    imported.
    """
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torchvision":
            return  # it is not installed
        # Python's own mark for a module that must not be imported; finders see it as not installed.
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        logger.warning(
            f"torchvision is installed but does not import ({error}), so it is treated as absent. Uninstall it, or "
            "install the build that belongs to this torch."
        )
        from transformers.utils import is_torchvision_available

        # transformers may have looked for it before and remember that it is there.
        is_torchvision_available.cache_clear()
