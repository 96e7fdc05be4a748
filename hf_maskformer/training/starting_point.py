"""The model and the image processor from which training starts."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file
from transformers import AutoBackbone, AutoConfig
from transformers.utils import logging

from ..configuration_maskformer import MaskFormerConfig
from ..configuration_maskformer_parts import SimpleFeaturePyramidConfig
from ..configuration_per_pixel_baseline import is_per_pixel_baseline
from ..data.labels import LabelSet, shorten, with_unique_names
from ..evaluation.tasks import Task, check_model
from ..hub.conversion import load_original_backbone
from ..image_processing_maskformer import MaskFormerImageProcessor
from ..modeling_maskformer import MaskFormerForInstanceSegmentation
from ..modeling_maskformer_feature_pyramid import SimpleFeaturePyramid
from ..modeling_maskformer_swin import SwinBackbone
from ..modeling_per_pixel_baseline import PerPixelBaselineForSemanticSegmentation
from .presets import Model, config_label_fields

# The tensors of each model that depend on the classes.
HEADS: dict[Any, tuple[str, ...]] = {
    MaskFormerForInstanceSegmentation: (
        "class_predictor.weight",
        "class_predictor.bias",
        "criterion.empty_weight",
    ),
    PerPixelBaselineForSemanticSegmentation: (
        "classifier.weight",
        "classifier.bias",
        "model.transformer_module.queries_embedder.weight",
    ),
}

# Suffixes of published weights, besides those that transformers reads.
FILE_SUFFIXES = (".pth", ".pt", ".pkl")

logger = logging.get_logger(__name__)


def new_model(config: str, labels: LabelSet) -> Model:
    """A model with random weights for these classes, from a configuration file or folder, or a name on the Hub."""
    model_class = model_class_of(config)
    model_config = model_class.config_class.from_pretrained(config, **class_fields(model_class, labels))
    # A file may describe a model too large for memory: on the meta device it is rejected by its number of parameters.
    with torch.device("meta"):
        model_class(model_config)
    return model_class(model_config)


def model_on_backbone(backbone: str, labels: LabelSet) -> MaskFormerForInstanceSegmentation:
    """A MaskFormer for these classes whose backbone is pretrained and whose other weights are random.

    Args:
        backbone: a folder or a name on the Hub of a model that transformers supports as a backbone, such as
            "microsoft/resnet-50", "microsoft/swin-tiny-patch4-window7-224" or "facebook/dinov2-base"; or of a timm
            model, such as "timm/resnet50.a1_in1k".
        labels: the classes of the data.

    Raises:
        ValueError: it is not such a model, or lacks weights of the backbone.
    """
    config = MaskFormerConfig.from_backbone(backbone, **class_fields(MaskFormerForInstanceSegmentation, labels))
    model = MaskFormerForInstanceSegmentation(config)
    load_backbone(model, backbone)
    return model


def load_backbone_weights(model: Model, source: str) -> None:
    """Loads the weights of a pretrained backbone into a model.

    Args:
        model: the model.
        source: a `.pth` or `.pkl` file of torchvision, detectron2 or Swin's authors, or as for `load_backbone`.
    """
    if source.endswith(FILE_SUFFIXES):
        load_original_backbone(model, source)
        model.name_or_path = source
    else:
        load_backbone(model, source)


def check_backbone(source: str) -> None:
    """Raises an OSError or ValueError if there is no backbone of this name, for `load_backbone_weights`."""
    if not source.endswith(FILE_SUFFIXES):
        try:
            model_type = AutoConfig.from_pretrained(source).model_type
        except OSError as error:
            raise _unreadable(source, error) from error
        if model_type in {model_class.config_class.model_type for model_class in HEADS}:
            raise ValueError(f"{source} is a whole model ({model_type}), not a backbone. Give it as --checkpoint.")
    elif not Path(source).is_file():
        raise FileNotFoundError(f"{source} does not exist. docs/reproducing.md says which files the paper starts from.")


def load_backbone(model: Model, backbone: str) -> None:
    """Loads the weights of a pretrained backbone, a folder or a name on the Hub, into a model built on it.

    Raises:
        ValueError: weights that the backbone needs are missing, or have another shape.
    """
    encoder = model.model.pixel_level_module.encoder
    config = AutoConfig.from_pretrained(backbone)
    if config.model_type == "timm_wrapper":
        from transformers import TimmBackbone  # here, because it fails if timm does not import

        source = f"{'local-dir' if Path(backbone).is_dir() else 'hf-hub'}:{backbone}"
        loaded = TimmBackbone.from_pretrained(source, out_indices=model.config.backbone_config.out_indices)
        loading_info: dict[str, Any] = {"missing_keys": ()}  # timm raises for these
    else:
        # AutoBackbone itself looks up every name on the Hub, and so does not support folders.
        with torch.device("meta"):
            backbone_class: Any = type(AutoBackbone.from_config(config))
        loaded, loading_info = backbone_class.from_pretrained(backbone, output_loading_info=True)
    target = encoder.backbone if isinstance(encoder, SimpleFeaturePyramid) else encoder
    # Missing weights are in the state dict too, randomly initialised.
    missing = set(loading_info["missing_keys"])
    tensors = {name: tensor for name, tensor in loaded.state_dict().items() if name not in missing}
    if isinstance(encoder, SwinBackbone):
        # Our names are those on disk, which differ from transformers' names in memory for a Swin.
        with TemporaryDirectory() as folder:
            loaded.save_pretrained(folder, state_dict=tensors)
            stored = load_file(Path(folder) / "model.safetensors")
        tensors = {name.replace("swin.", "model.", 1): tensor for name, tensor in stored.items()}
    own = target.state_dict()
    # Norms on the output maps of a backbone are MaskFormer's own; relative positions in a window are computed.
    elsewhere = ("hidden_states_norms.", "layernorm.", "relative_position_index")
    absent = [
        name
        for name, tensor in own.items()
        if not any(part in name for part in elsewhere) and (name not in tensors or tensors[name].shape != tensor.shape)
    ]
    if absent:
        raise ValueError(
            f"{backbone} lacks weights of the backbone or has them in another shape: {shorten(absent)}. Use a "
            "pretrained model of the same architecture."
        )
    target.load_state_dict({name: tensors[name] for name in own if name in tensors}, strict=False)
    model.name_or_path = backbone  # the starting point in the model card


def pretrained_model(checkpoint: str, labels: LabelSet, reinitialize_head: bool = False) -> Model:
    """A checkpoint's model for these classes.

    Args:
        checkpoint: a folder, or a name on the Hub.
        labels: the classes of the data.
        reinitialize_head: if the checkpoint has other classes, in number or by name, start with a random class
            predictor; its tensors are named in a warning.

    Raises:
        ValueError: the checkpoint has another number of classes and `reinitialize_head` is False.
    """
    model_class = model_class_of(checkpoint)
    config = model_class.config_class.from_pretrained(checkpoint)
    check_classes_of_checkpoint(config, labels, checkpoint, reinitialize_head)
    # If only the names differ, the classifier's shape does not reveal the change of meaning.
    renamed = renamed_classes(config.id2label, labels)
    if config.num_labels == labels.num_labels and renamed and not reinitialize_head:
        logger.warning(
            f"{checkpoint} has as many classes as the data, but other names ({shorten(renamed)}). Its class predictor "
            "is kept, with the data's names. Pass reinitialize_head=True (--reinitialize_head true) to train a new one."
        )
    model, loading_info = model_class.from_pretrained(
        checkpoint,
        **class_fields(model_class, labels),
        ignore_mismatched_sizes=reinitialize_head,
        output_loading_info=True,
    )
    new = sorted({name for name, *_ in loading_info["mismatched_keys"]} | set(loading_info["missing_keys"]))
    unexpected = [name for name in new if name not in HEADS[model_class]]
    if unexpected:
        raise ValueError(
            f"{len(unexpected)} tensors that the model needs are not in {checkpoint} or have another shape, such as "
            f"{unexpected[0]}. It is not a complete MaskFormer checkpoint."
        )
    if renamed and reinitialize_head:
        for name in {name.rpartition(".")[0] for name in HEADS[model_class]} & dict(model.named_modules()).keys():
            model.get_submodule(name).reset_parameters()
        new = [name for name in HEADS[model_class] if name in model.state_dict()]
    new_weights = [name for name in new if name in dict(model.named_parameters())]
    if new_weights:
        logger.warning(f"The class predictor of {checkpoint} is replaced by a random one: {', '.join(new_weights)}.")
    return model


def check_classes_of_checkpoint(config: Any, labels: LabelSet, checkpoint: str, reinitialize_head: bool) -> None:
    """Raises a ValueError if a checkpoint has another number of classes and keeps its class predictor."""
    if config.num_labels != labels.num_labels and not reinitialize_head:
        raise ValueError(
            f"{checkpoint} has {config.num_labels} classes, but the data has {labels.num_labels}. Pass "
            "reinitialize_head=True (--reinitialize_head true) to train a new class predictor on top of the other "
            "weights."
        )


def renamed_classes(names: dict[int, str], labels: LabelSet) -> list[str]:
    """Describes how a checkpoint's class names differ from those of the data; default names are ignored."""
    if all(name == f"LABEL_{label}" for label, name in names.items()):
        return []
    apart = with_unique_names(names)
    return [
        f"class {label} is {names[label]!r} there but {name!r} in the data"
        for label, name in labels.id2label.items()
        if name not in (names.get(label, name), apart.get(label, name))
    ]


def model_class_of(checkpoint: str) -> Any:
    """The class of a checkpoint's or configuration's model (a file, a folder or a name on the Hub).

    Raises a FileNotFoundError if there is no such checkpoint or the Hub denies access, and a ValueError if it is of
    another model.
    """
    # No name on the Hub looks like this, and asking it takes long without a network.
    if checkpoint.endswith(".json") and not Path(checkpoint).is_file():
        raise FileNotFoundError(
            f"{checkpoint} does not exist. Name a configuration file, a folder with one or a checkpoint."
        )
    folder = Path(checkpoint)
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{checkpoint} holds adapters without their model. Merge them with "
                "PeftModel.from_pretrained(model, FOLDER).merge_and_unload(), save the result and the image processor, "
                "and name that folder."
            )
        inside = next(iter(sorted(folder.glob("*/config.json"))), None)
        raise FileNotFoundError(
            f"{checkpoint} has no config.json{'' if inside is None else f', but {inside.parent} has'}. Name the folder "
            "of a checkpoint."
        )
    try:
        content, _ = MaskFormerConfig.get_config_dict(checkpoint)
    except (OSError, HFValidationError) as error:
        raise _unreadable(checkpoint, error) from error
    for model_class in HEADS:
        if model_class.config_class.model_type == content.get("model_type"):
            return model_class
    known = " or ".join(repr(model_class.config_class.model_type) for model_class in HEADS)
    raise ValueError(
        f"{checkpoint} has model_type {content.get('model_type')!r}, but must have {known}. Name a configuration or "
        "checkpoint of one of these."
    )


def _unreadable(source: str, error: Exception) -> Exception:
    """The error to raise where the configuration of a folder or of a name on the Hub cannot be read."""
    reason = str(error).splitlines()[0]
    if (Path(source) / "config.json").is_file():
        return ValueError(f"The configuration of {source} cannot be read ({reason}). Save or copy it again.")
    return FileNotFoundError(
        f"{source} is not a folder with a config.json, and cannot be read as a name on the Hub ({reason}). Check the "
        "spelling of the path or name."
    )


def target_format(model: Model) -> Literal["segment_map", "label_map"]:
    """The form of targets that a model trains with, for the data collator."""
    return "label_map" if is_per_pixel_baseline(model) else "segment_map"


def image_processor_for(
    labels: LabelSet,
    image_size: int,
    checkpoint: str | None = None,
    model: Model | None = None,
    task: Task = "semantic",
) -> MaskFormerImageProcessor:
    """An image processor for data with these labels; from a checkpoint it keeps normalisation and padding.

    Args:
        labels: the classes of the data.
        image_size: shorter side of images at evaluation, in pixels; the longer one is at most four times that.
        checkpoint: a folder or a name on the Hub.
        model: the model that the images are for. A plain vision transformer needs whole patches.
        task: what is trained and evaluated; `hf_maskformer.evaluation.tasks.task_of_data` returns that of a data set.
            Panoptic segmentation has one segment per stuff class; if the data do not say which classes are stuff, none
            is fused.
    """
    if model is not None:
        check_model(task, model)
    # A semantic model has no instances, whatever its classes are.
    all_is_stuff = task == "semantic" and not labels.thing_ids
    settings: dict[str, Any] = {
        "size": {"shortest_edge": image_size, "longest_edge": 4 * image_size},
        "ignore_index": labels.ignore_index,
        "do_reduce_labels": labels.do_reduce_labels,
        "num_labels": labels.num_labels,
        "segmentation_task": task,
        "label_ids_to_fuse": list(labels.id2label if all_is_stuff else labels.stuff_ids),
    }
    if model is not None and isinstance(model.config.backbone_config, SimpleFeaturePyramidConfig):
        settings["size_divisor"] = model.config.backbone_config.backbone_config.patch_size
    if checkpoint is None:
        return MaskFormerImageProcessor(**settings)
    return MaskFormerImageProcessor.from_pretrained(checkpoint, **settings)


def class_fields(model_class: Any, labels: LabelSet) -> dict[str, Any]:
    """The fields of a model's configuration that depend on the data."""
    fields = config_label_fields(labels, labels.num_labels)
    if model_class is PerPixelBaselineForSemanticSegmentation:
        fields["semantic_loss_ignore_index"] = labels.ignore_index
    return fields
