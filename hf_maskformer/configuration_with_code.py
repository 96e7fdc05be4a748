"""What both configurations share: backbone and labels, fields that override a file, and code that comes with it."""

from os import PathLike
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from .configuration_maskformer_parts import (
    ATTENTION_FIELDS,
    check_labels,
    check_num_labels,
    errors_as_value_errors,
    make_backbone_config,
    refuse_backbone_by_name,
    warn_of_misplaced_fields,
    warn_of_misspelt_fields,
)

DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
LABELS = ("num_labels", "id2label", "label2id")  # three names for one thing: new labels replace all of them


class ConfigWithCode(PreTrainedConfig):
    """A configuration with a backbone and labels, both checked.

    Once it is registered for saving with its code, it names the class of every Auto class: transformers'
    `register_for_auto_class` alone would name one for each of our classes.
    """

    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig, "decoder_config": AutoConfig}
    # Per-image sizes and loss terms are not predictions: Trainer must not gather them.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["loss_dict", "image_sizes", "padded_sizes"]
    default_backbone: ClassVar[dict[str, Any]] = {}
    # "file.Class" for each Auto class.
    files_of_auto_classes: ClassVar[dict[str, str]] = {}

    backbone_config: Any = None
    decoder_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_num_labels(kwargs.get("num_labels"))
        refuse_backbone_by_name(self.backbone_config, kwargs)
        self.backbone_config = make_backbone_config(self.backbone_config, self.default_backbone)
        for labels in ("id2label", "label2id"):
            value = getattr(self, labels)
            if not isinstance(value, dict | None):
                raise ValueError(f"{labels} is a {type(value).__name__}, but must be a dictionary of ids and names.")
        if self.id2label is None and self.label2id:  # transformers would count two classes
            names: dict[Any, Any] = {label: name for name, label in self.label2id.items()}
            if len(names) < len(self.label2id):
                raise ValueError(f"label2id has {len(self.label2id)} names for {len(names)} labels; give each its own.")
            self.id2label = names
        super().__post_init__(**kwargs)
        if self.label2id is None and self.id2label:
            label2id: dict[Any, Any] = {name: label for label, name in self.id2label.items()}
            self.label2id = label2id
        check_labels(self.id2label)
        warn_of_misspelt_fields(self, kwargs)
        warn_of_misplaced_fields(self, kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads the JSON of a configuration. Raises an OSError if there is none, or it is not a JSON object."""
        try:
            content, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # transformers assumes that the file holds an object, and not a thousand nested ones.
        except (AttributeError, TypeError, RecursionError) as error:
            raise OSError(
                f"{pretrained_model_name_or_path} holds no configuration as a JSON object ({error})."
            ) from error
        if not isinstance(content, dict):
            raise OSError(f"{pretrained_model_name_or_path} holds a {type(content).__name__}, not a JSON object.")
        return content, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds a configuration from a file's content. Fields among `kwargs` override it and are checked like it.

        A dictionary for a nested configuration replaces the fields that it names, as a whole if they are nested; or, if
        it names another `model_type`, the entire configuration. If the number of labels is that of the file, they keep
        their names.

        Raises:
            ValueError: A field has an invalid value or type; the message names it.
        """
        # transformers only warns, and builds this model with weights missing.
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"The configuration is for a model of type {model_type!r}, but {cls.__name__} is for "
                f"{cls.model_type!r}. Use the class of that type."
            )
        overrides = {name: kwargs.pop(name) for name in kwargs.keys() & {*cls.__dataclass_fields__, *LABELS}}
        for name in overrides.keys() & cls.sub_configs.keys():
            if isinstance(overrides[name], dict):
                content = config_dict.get(name)
                overrides[name] = _changed(getattr(cls(), name) if content is None else content, overrides[name])
        labels = {name: overrides.pop(name) for name in LABELS if name in overrides}
        labels = {name: value for name, value in labels.items() if value is not None}
        names, number = config_dict.get("id2label"), labels.get("num_labels")
        if labels.keys() == {"num_labels"} and isinstance(number, int) and isinstance(names, dict):
            labels = {} if number == len(names) else labels
        overrides |= labels
        left_out = set(LABELS) if labels else set()
        if cls._auto_class is None:
            # It refers to files beside the one that was read, which a checkpoint saved from here will not have.
            left_out.add("auto_map")
        # A Hub name there would make transformers download code and run it.
        left_out.update(ATTENTION_FIELDS)
        config_dict = {name: value for name, value in config_dict.items() if name not in left_out}
        # Fields unknown to this class become attributes, and so must not shadow a method.
        methods = sorted(name for name in config_dict if callable(getattr(cls, str(name), None)))
        if methods:
            raise ValueError(
                f"The configuration has the field {methods[0]!r}, which is the name of a method. Remove it."
            )
        dtype = str(config_dict.get("dtype") or config_dict.get("torch_dtype") or "auto").removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(
                f"The dtype of the configuration is {dtype[:60]!r}, but must be one of {', '.join(DTYPES)}."
            )
        with errors_as_value_errors("The configuration"):
            return super().from_dict({**config_dict, **overrides}, **kwargs)

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        if self._auto_class is not None:
            self.auto_map = dict(self.files_of_auto_classes)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)


def _changed(content: Any, changes: dict[str, Any]) -> Any:
    """The content of a nested configuration with the fields that a dictionary names replaced.

    One of another type replaces it; anything but a configuration stays, to be rejected as if from a file.
    """
    content = content.to_dict() if isinstance(content, PreTrainedConfig) else content
    if not isinstance(content, dict):
        return changes if content is None else content
    is_of_other_type = changes.get("model_type", content.get("model_type")) != content.get("model_type")
    return changes if is_of_other_type else {**content, **changes}
