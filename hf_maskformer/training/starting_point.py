"""The model and the image processor with which a training begins."""

from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..configuration_maskformer import MaskFormerConfig
from ..data.labels import LabelSet
from ..image_processing_maskformer import MaskFormerImageProcessor
from ..modeling_maskformer import MaskFormerForInstanceSegmentation

HEAD = ("class_predictor.weight", "class_predictor.bias", "criterion.empty_weight")

logger = logging.get_logger(__name__)


def new_model(config: str, labels: LabelSet) -> MaskFormerForInstanceSegmentation:
    """A model with random weights for these classes, from a configuration file or folder, or a name on the Hub."""
    if config.endswith(".json") and not Path(config).is_file():
        raise FileNotFoundError(
            f"{config} does not exist. Name a configuration file, a folder with one or a checkpoint."
        )
    return MaskFormerForInstanceSegmentation(MaskFormerConfig.from_pretrained(config, **_names(labels)))


def pretrained_model(
    checkpoint: str, labels: LabelSet, reinitialize_head: bool = False
) -> MaskFormerForInstanceSegmentation:
    """A checkpoint's model for these classes.

    Args:
        checkpoint: a folder, or a name on the Hub.
        labels: the classes of the data.
        reinitialize_head: with another number of classes, begin with a random class predictor; its tensors are named
            in a warning.

    Raises:
        ValueError: the checkpoint has another number of classes and `reinitialize_head` is False.
    """
    check_model_type(checkpoint)
    config = MaskFormerConfig.from_pretrained(checkpoint)
    if config.num_labels != labels.num_labels and not reinitialize_head:
        raise ValueError(
            f"{checkpoint} has {config.num_labels} classes, but the data has {labels.num_labels}. Pass "
            "reinitialize_head=True to train a new class predictor on top of the other weights."
        )
    # The classifier's shape hides a change of meaning when only the names differ.
    names: dict[int, str] = config.id2label  # type: ignore[assignment]  # the configuration makes ids integers
    renamed = [label for label, name in labels.id2label.items() if names.get(label, name) != name]
    if config.num_labels == labels.num_labels and renamed and not _are_default(names):
        logger.warning(
            f"{checkpoint} has as many classes as the data, but other names. Its class predictor is kept, with the "
            f"data's names: class {renamed[0]} was {names[renamed[0]]!r} and is now {labels.id2label[renamed[0]]!r}."
        )
    loaded: Any = MaskFormerForInstanceSegmentation.from_pretrained(
        checkpoint, **_names(labels), ignore_mismatched_sizes=reinitialize_head, output_loading_info=True
    )
    model, loading_info = loaded
    new = sorted({name for name, *_ in loading_info["mismatched_keys"]} | set(loading_info["missing_keys"]))
    unexpected = [name for name in new if name not in HEAD]
    if unexpected:
        raise ValueError(
            f"{len(unexpected)} tensors that the model needs are not in {checkpoint} or have another shape, such as "
            f"{unexpected[0]}. It is no complete MaskFormer checkpoint."
        )
    if new:
        logger.warning(f"The class predictor of {checkpoint} is replaced by a random one: {', '.join(new)}.")
    return model


def check_model_type(checkpoint: str) -> None:
    """Raises a ValueError if the checkpoint (a folder or a name on the Hub) is of another model."""
    content, _ = MaskFormerConfig.get_config_dict(checkpoint)
    if content.get("model_type") != MaskFormerConfig.model_type:
        raise ValueError(
            f"{checkpoint} is a model of type {content.get('model_type')!r}, not 'maskformer'. Name a MaskFormer "
            "checkpoint."
        )


def image_processor_for(labels: LabelSet, image_size: int, checkpoint: str | None = None) -> MaskFormerImageProcessor:
    """An image processor for data with these labels; from a checkpoint it keeps normalisation and padding.

    Args:
        labels: the classes of the data.
        image_size: shorter side of images at evaluation, in pixels; the longer one is at most four times that.
        checkpoint: a folder or a name on the Hub.
    """
    settings: dict[str, Any] = {
        "size": {"shortest_edge": image_size, "longest_edge": 4 * image_size},
        "ignore_index": labels.ignore_index,
        "do_reduce_labels": labels.do_reduce_labels,
        "num_labels": labels.num_labels,
        "segmentation_task": "semantic",
        "label_ids_to_fuse": [label for label in labels.id2label if label not in labels.thing_ids],
    }
    if checkpoint is None:
        return MaskFormerImageProcessor(**settings)
    return MaskFormerImageProcessor.from_pretrained(checkpoint, **settings)


def _names(labels: LabelSet) -> dict[str, Any]:
    return {"id2label": labels.id2label, "label2id": {name: label for label, name in labels.id2label.items()}}


def _are_default(names: dict[int, str]) -> bool:
    return all(name == f"LABEL_{label}" for label, name in names.items())
