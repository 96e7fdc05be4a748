"""Small random models and batches."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoImageProcessor,
    ConvNextConfig,
    DetrConfig,
    PreTrainedConfig,
    ResNetConfig,
    SwinConfig,
    Swinv2Config,
)
from transformers.utils import is_torchvision_available

from hf_maskformer import MaskFormerConfig, MaskFormerForInstanceSegmentation
from hf_maskformer.configuration_maskformer_parts import MaskFormerResNetConfig, MaskFormerTransformerConfig

NUM_LABELS = 4
NUM_QUERIES = 6

needs_auto_image_processor = pytest.mark.skipif(
    "torchvision" in getattr(AutoImageProcessor, "_backends", ()) and not is_torchvision_available(),
    reason="this transformers has no AutoImageProcessor without torchvision",
)


def resnet_config() -> ResNetConfig:
    return ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1])


def swin_config() -> SwinConfig:
    return SwinConfig(embed_dim=8, depths=[2, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=4, drop_path_rate=0.0)


def convnext_config() -> ConvNextConfig:
    return ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 32, 64])


def swinv2_config() -> Swinv2Config:
    return Swinv2Config(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4)


def tiny_config(backbone: PreTrainedConfig | None = None, **fields: object) -> MaskFormerConfig:
    decoder = DetrConfig(
        d_model=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        num_queries=NUM_QUERIES,
        dropout=0.0,
    )
    fields = {"fpn_feature_size": 32, "mask_feature_size": 16, "decoder_config": decoder, **fields}
    if "id2label" not in fields:
        fields["num_labels"] = NUM_LABELS
    return MaskFormerConfig(backbone_config=backbone or resnet_config(), **fields)


def tiny_model(backbone: PreTrainedConfig | None = None, **fields: object) -> MaskFormerForInstanceSegmentation:
    return MaskFormerForInstanceSegmentation(tiny_config(backbone, **fields))


def model_with_encoders() -> MaskFormerForInstanceSegmentation:
    backbone = MaskFormerResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 3])
    transformer = MaskFormerTransformerConfig(
        d_model=16, num_queries=6, pixel_decoder_layers=1, encoder_layers=1, decoder_layers=2, dropout=0.0
    )
    return tiny_model(backbone, decoder_config=transformer)


ARCHITECTURES = {
    "resnet": tiny_model,
    "swin": lambda: tiny_model(swin_config()),
    "encoders": model_with_encoders,
}


def tiny_batch(batch_size: int = 2, size: tuple[int, int] = (64, 96)) -> dict[str, torch.Tensor]:
    """Random images, each with a segment on the left, one on the right and void between them; index map form."""
    height, width = size
    index_map = torch.full((batch_size, height, width), -1)
    index_map[:, :, : width // 3] = 0
    index_map[:, : height // 2, width // 2 :] = 1
    return {
        "pixel_values": torch.randn(batch_size, 3, height, width),
        "mask_labels": index_map,
        "class_labels": torch.tensor([[0, 2], [3, 1]]).repeat(batch_size, 1)[:batch_size],
    }


def as_mask_list(batch: dict[str, torch.Tensor]) -> dict[str, object]:
    """The same batch with a list of float masks and labels per image, transformers' own form."""
    labels = [image_labels[image_labels != -100] for image_labels in batch["class_labels"]]
    masks = [
        torch.stack([(index_map == segment).float() for segment in range(len(image_labels))])
        if len(image_labels)
        else torch.zeros(0, *index_map.shape)
        for index_map, image_labels in zip(batch["mask_labels"], labels, strict=True)
    ]
    return {"pixel_values": batch["pixel_values"], "mask_labels": masks, "class_labels": labels}


def masks(model: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values).masks_queries_logits


class Operations(TorchDispatchMode):
    """Counts what is started on a device: neither views nor memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aliases = [output.alias_info for output in function._schema.returns]
        is_view = any(alias and not alias.is_write for alias in aliases) or "view" in function.__name__
        self.count += not (is_view or "empty" in function.__name__)
        return function(*args, **(kwargs or {}))
