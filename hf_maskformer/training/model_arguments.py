"""Training options for the model to start from."""

from dataclasses import dataclass, field
from typing import Any

from ..configuration_maskformer import MaskFormerConfig
from ..data.labels import LabelSet
from ..evaluation.tasks import Task
from ..image_processing_maskformer import MaskFormerImageProcessor
from .presets import Config, Model, config_label_fields, find_preset
from .recipes import check_data, recipe_image_processor
from .starting_point import (
    check_backbone,
    check_classes_of_checkpoint,
    class_fields,
    image_processor_for,
    load_backbone_weights,
    model_class_of,
    model_on_backbone,
    new_model,
    pretrained_model,
)


@dataclass
class ModelArguments:
    """A model of the paper by name, a checkpoint, a backbone or a configuration.

    Raises:
        ValueError: these cannot be combined.
    """

    preset: str | None = field(default=None, metadata={"help": "Model of the paper: its architecture and its recipe."})
    checkpoint: str | None = field(default=None, metadata={"help": "Checkpoint to fine-tune: a folder or a Hub name."})
    backbone: str | None = field(default=None, metadata={"help": "Pretrained backbone for a new model: likewise."})
    config: str | None = field(default=None, metadata={"help": "Configuration of a model with random weights."})
    backbone_weights: str | None = field(
        default=None,
        metadata={
            "help": "With --preset or --config, weights of the backbone: a .pth or .pkl file, a folder or a Hub name; "
            "'random' for none."
        },
    )
    reinitialize_head: bool = field(
        default=False, metadata={"help": "Replace the class predictor if the checkpoint has other classes."}
    )

    def __post_init__(self) -> None:
        if self.preset is None:
            if [self.checkpoint, self.backbone, self.config].count(None) != 2:
                raise ValueError(
                    "Give one of --checkpoint (to fine-tune), --backbone (a new model on a pretrained backbone), "
                    "--preset (a model and recipe of the paper) and --config (to train from scratch)."
                )
            if self.backbone_weights is not None and self.config is None:
                raise ValueError("--backbone_weights is for the model of --preset or --config. Leave it out.")
            return
        find_preset(self.preset)
        if self.config is not None:
            raise ValueError("--preset has its own configuration. Leave --config out.")
        if [self.checkpoint, self.backbone, self.backbone_weights].count(None) < 2:
            raise ValueError("Give only one of --checkpoint, --backbone and --backbone_weights with --preset.")

    @property
    def title(self) -> str:
        """What is trained, in one line."""
        if self.preset is None:
            return f"Starts from {self.checkpoint or self.backbone or self.config}."
        preset = find_preset(self.preset)
        reported = f"{preset.reported} {preset.data_set.metric} as reported by the paper's authors"
        begins = self.checkpoint or self.backbone or self.backbone_weights or "backbone weights, still to be given"
        return f"{preset.name}: {preset.data_set.title}, {preset.backbone}, {reported}. Starts from {begins}."

    def check(self, is_training: bool = True) -> None:
        """Detects a misspelt or missing name before the data are read."""
        if is_training and self.preset and not (self.checkpoint or self.backbone or self.backbone_weights):
            raise ValueError(
                f"{self.preset} starts from a backbone trained on ImageNet. Give --backbone_weights, a file or a name "
                "on the Hub (docs/reproducing.md says which); --backbone_weights random to do without; or --checkpoint "
                "to fine-tune a whole model."
            )
        for backbone in (self.backbone, self._weights):
            if backbone is not None:
                check_backbone(backbone)
        for checkpoint in (self.checkpoint, self.config):
            if checkpoint is not None:
                model_class_of(checkpoint)

    def check_data(self, dataset: Any, task: str | None = None) -> None:
        """Checks that the data, and the requested task, match the preset, if there is one.

        Raises what `recipes.check_data` does, and a ValueError for another task than the preset's.
        """
        if self.preset is None:
            return
        preset = find_preset(self.preset)
        own_task = preset.data_set.task
        if task not in (None, own_task):
            raise ValueError(f"--task is {task}, but {preset.name} is for {own_task} segmentation. Leave --task out.")
        check_data(preset, dataset, is_fine_tuning=self.checkpoint is not None)

    def model(self, labels: LabelSet) -> Model:
        """The model for these classes."""
        if self.checkpoint is not None:
            return pretrained_model(self.checkpoint, labels, self.reinitialize_head)
        if self.preset is not None:
            model = find_preset(self.preset).model(labels)
        elif self.config is not None:
            model = new_model(self.config, labels)
        else:
            assert self.backbone is not None
            return model_on_backbone(self.backbone, labels)
        weights = self.backbone or self._weights
        if weights is not None:
            load_backbone_weights(model, weights)
        return model

    def planned_config(self, labels: LabelSet | None) -> Config:
        """The configuration of that model, without reading weights; None stands for its own classes.

        Raises what `pretrained_model` does for a checkpoint with other classes.
        """
        if self.checkpoint is not None and labels is not None:
            config = model_class_of(self.checkpoint).config_class.from_pretrained(self.checkpoint)
            check_classes_of_checkpoint(config, labels, self.checkpoint, self.reinitialize_head)
        source = self.checkpoint or self.config
        if source is not None:
            model_class = model_class_of(source)
            fields = {} if labels is None else class_fields(model_class, labels)
            return model_class.config_class.from_pretrained(source, **fields)
        if self.preset is not None:
            return find_preset(self.preset).config(labels)
        assert self.backbone is not None
        fields = {} if labels is None else config_label_fields(labels, labels.num_labels)
        return MaskFormerConfig.from_backbone(self.backbone, **fields)

    def image_processor(
        self, labels: LabelSet | None, image_size: int, model: Model | None = None, task: Task = "semantic"
    ) -> MaskFormerImageProcessor | None:
        """The image processor for the model; None if it depends on classes that are not given.

        A preset has its own task.
        """
        if self.preset is None:
            if labels is None:
                return None
            return image_processor_for(labels, image_size, self.checkpoint, model, task)
        return recipe_image_processor(find_preset(self.preset), labels, image_size, self.checkpoint)

    @property
    def _weights(self) -> str | None:
        return None if self.backbone_weights == "random" else self.backbone_weights
