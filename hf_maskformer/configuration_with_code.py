"""What a configuration says about code: a checkpoint may carry its modelling files, for use without this package."""

from os import PathLike
from typing import Any, ClassVar

from transformers import PreTrainedConfig


class ConfigWithCode(PreTrainedConfig):
    """A configuration that names, once it is registered for saving with its code, the class of every Auto class.

    transformers' `register_for_auto_class` alone would name one for each of our classes.
    """

    # "file.Class" for each Auto class.
    files_of_auto_classes: ClassVar[dict[str, str]] = {}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if cls._auto_class is None:
            # It names files beside the one that was read, which a checkpoint saved from here will not have.
            config_dict = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        if self._auto_class is not None:
            self.auto_map = dict(self.files_of_auto_classes)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
