"""The model card of a converted checkpoint."""

from huggingface_hub import ModelCardData

from ..configuration_maskformer import MaskFormerConfig
from ..configuration_per_pixel_baseline import PerPixelBaselineConfig
from ..training.presets import PRESETS, Preset
from .original_checkpoint import OriginalCheckpoint

TEMPLATE = """---
{metadata}
---

# {title}

{origin}

## How to use

```python
from PIL import Image
from hf_maskformer import {model_class}, MaskFormerImageProcessor

model = {model_class}.from_pretrained("{title}")
image_processor = MaskFormerImageProcessor.from_pretrained("{title}")
image = Image.open("photo.jpg")
outputs = model(**image_processor(image, return_tensors="pt"))
{post_processing}
```

## Licence

{licence}
"""
SEMANTIC = """target_sizes = [(image.height, image.width)]
labels = image_processor.post_process_semantic_segmentation(outputs, target_sizes=target_sizes)[0]"""
PANOPTIC = """target_sizes = [(image.height, image.width)]
thresholds = model.config.panoptic_thresholds
result = image_processor.post_process_panoptic_segmentation(outputs, **thresholds, target_sizes=target_sizes)[0]"""
ZOO_LICENCE = "CC BY-NC 4.0, under which the paper's authors publish their weights: no commercial use."
OTHER_LICENCE = "That of the file that was converted."


def conversion_card(
    checkpoint: OriginalCheckpoint, config: MaskFormerConfig | PerPixelBaselineConfig, name: str
) -> str:
    """The text of README.md, with its metadata. `name` is what the card calls the model."""
    is_zoo = checkpoint.path.suffix == ".pkl" and not checkpoint.is_backbone
    is_baseline = isinstance(config, PerPixelBaselineConfig)
    metadata = ModelCardData(
        license="cc-by-nc-4.0" if is_zoo else "unknown",
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["maskformer" if not is_baseline else "per-pixel-baseline"],
    )
    return TEMPLATE.format(
        metadata=metadata.to_yaml(),
        title=name,
        origin=_origin(checkpoint, config),
        model_class=f"{'PerPixelBaselineForSemantic' if is_baseline else 'MaskFormerForInstance'}Segmentation",
        post_processing=PANOPTIC if hasattr(config, "panoptic_thresholds") else SEMANTIC,
        licence=ZOO_LICENCE if is_zoo else OTHER_LICENCE,
    )


def _origin(checkpoint: OriginalCheckpoint, config: MaskFormerConfig | PerPixelBaselineConfig) -> str:
    method = "MaskFormer"
    if isinstance(config, PerPixelBaselineConfig):
        method = "PerPixelBaseline" if config.decoder_config is None else "PerPixelBaseline+"
    model = f"{method} ([arXiv 2107.06278](https://arxiv.org/abs/2107.06278)) for {config.num_labels} classes"
    if checkpoint.is_backbone:
        return (
            f"{model}, to be trained: the backbone has the weights of `{checkpoint.path.name}`, and **everything else "
            "is random**."
        )
    # The model zoo names each file after its content.
    presets = [preset for preset in PRESETS.values() if preset.weights_file == checkpoint.path.name]
    reported = f"\n\n{_reported(presets[0])}" if presets else ""
    return f"{model}, converted from `{checkpoint.path.name}`.{reported}"


def _reported(preset: Preset) -> str:
    text = f"{preset.reported} {preset.data_set.metric} on {preset.data_set.title}"
    if preset.reported_multi_scale is not None:
        text += f", {preset.reported_multi_scale} with several scales and flips"
    return f"Reported by the paper's authors for these weights, not measured again here: {text}."
