"""The model card of a converted checkpoint, and the results that the paper's authors report."""

from huggingface_hub import EvalResult, ModelCard

from ..training.presets import PRESETS, Config, Preset
from .model_card import AUTHORS_LICENCE, AUTHORS_LICENCE_TEXT, describe, make_card
from .original_checkpoint import OriginalCheckpoint

OTHER_LICENCE_TEXT = (
    "That of the converted file. Weights that were trained from those of the paper's authors are CC BY-NC 4.0 too."
)
AUTHORS_TABLE = ("MaskFormer model zoo", "https://github.com/facebookresearch/MaskFormer/blob/main/MODEL_ZOO.md")


def conversion_card(checkpoint: OriginalCheckpoint, config: Config, task: str, name: str) -> ModelCard:
    """The card of a converted checkpoint's folder. `name` is what it calls the model, `task` what it is for."""
    preset = _zoo_preset(checkpoint)
    return make_card(
        config,
        task,
        name,
        origin=_origin(checkpoint, config, task),
        licence={"license": "unknown" if preset is None else AUTHORS_LICENCE},
        licence_text=OTHER_LICENCE_TEXT if preset is None else AUTHORS_LICENCE_TEXT,
        results=() if preset is None else reported_results(preset, task),
        results_text="" if preset is None else reported_text(preset),
    )


def reported_text(preset: Preset) -> str:
    """What the paper's authors report, in a sentence that says so."""
    text = f"{preset.reported} {preset.data_set.metric} on {preset.data_set.title}"
    if preset.reported_multi_scale is not None:
        text += f", {preset.reported_multi_scale} with several scales and flips"
    return f"Reported by the paper's authors for these weights, not measured again here: {text}."


def reported_results(preset: Preset, task: str) -> list[EvalResult]:
    """The same for the metadata of a card, each with its source."""
    metric, data_set = preset.data_set.metric, preset.data_set
    source_name, source_url = AUTHORS_TABLE
    figures = {metric: preset.reported, f"{metric}, several scales and flips": preset.reported_multi_scale}
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name=f"{task.capitalize()} segmentation",
            dataset_type=preset.data_set_name,
            dataset_name=data_set.title,
            dataset_split="validation",
            metric_type={"mIoU": "mean_iou", "PQ": "pq"}[metric],
            metric_name=f"{title} (reported by the authors, not measured)",
            metric_value=value,
            source_name=source_name,
            source_url=source_url,
        )
        for title, value in figures.items()
        if value is not None
    ]


def _origin(checkpoint: OriginalCheckpoint, config: Config, task: str) -> str:
    model = describe(config, task)
    if checkpoint.is_backbone:
        return (
            f"{model}, to be trained: the backbone has the weights of `{checkpoint.path.name}`, and **everything else "
            "is random**."
        )
    return f"{model}, converted from `{checkpoint.path.name}`."


def _zoo_preset(checkpoint: OriginalCheckpoint) -> Preset | None:
    """The preset whose published weights a file holds; the model zoo names each file after its content."""
    presets = [preset for preset in PRESETS.values() if preset.weights_file == checkpoint.path.name]
    return presets[0] if presets else None
