"""Treats a torchvision that is installed but does not import, as is common with CPU builds of torch, as absent."""

import logging
import sys

logger = logging.getLogger(__name__)


def hide_broken_torchvision() -> None:
    """Blocks torchvision in this process if it does not import, as transformers would then fail on every image.

    Does nothing if torchvision works or is missing. Must be called before importing anything from transformers that
    handles images.
    """
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torchvision":
            return  # it is not installed
        # Python's own marker for a module that must not be imported; finders treat it as not installed.
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        logger.warning(
            f"torchvision is installed but does not import ({error}), so it is treated as absent. Uninstall it, or "
            "install the build that matches this torch."
        )
        from transformers.utils import is_torchvision_available

        # transformers may have checked for it before and cached that it is available.
        is_torchvision_available.cache_clear()
