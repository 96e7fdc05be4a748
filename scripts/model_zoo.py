"""Prints the table of docs/model_zoo.md: parameters and FLOPs of the models, ours and the paper's, and its results.

    python scripts/model_zoo.py

Models are built and run on torch's meta device: nothing is computed and no weights are needed.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_maskformer.command_line import OptionParser
from hf_maskformer.training.presets import MASKFORMER, PRESETS, Preset, model_class

# Billions of multiply-adds of the paper's own implementation, counted by fvcore.
ORIGINAL_FLOPS = {
    "ade20k-r50": 50.9,
    "ade20k-r101": 70.4,
    "ade20k-r101c": 77.5,
    "ade20k-swin-tiny": 53.1,
    "coco-panoptic-r50": 126.4,
    "coco-panoptic-swin-tiny": 126.7,
}
# Millions of parameters and billions of operations in the paper's table 1.
PAPER = {
    "ade20k-r50": (41, 53),
    "ade20k-r101": (60, 73),
    "ade20k-r101c": (60, 80),
    "ade20k-swin-tiny": (42, 55),
    "ade20k-swin-small": (63, 79),
    "ade20k-swin-base": (102, 195),
    "ade20k-swin-large": (212, 375),
}
HEADER = """\
| preset | parameters | original | paper | size | FLOPs | with aux. | original | paper | reported | multi-scale |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def row(preset: Preset) -> str:
    """One row of the table."""
    config = preset.config()
    size = image_size(preset)
    with torch.device("meta"):
        model = model_class(config)(config).eval()
        image = torch.empty(1, 3, size, size)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    paper_parameters, paper_flops = PAPER.get(preset.name, ("", ""))
    cells = (
        f"`{preset.name}`",
        f"{parameters / 1e6:.3f}",
        f"{preset.reported_parameters:.3f}",
        paper_parameters,
        size,
        f"{multiply_adds(model, image) / 1e9:.1f}",
        f"{multiply_adds(model, image, output_auxiliary_logits=True) / 1e9:.1f}" if preset.method == MASKFORMER else "",
        ORIGINAL_FLOPS.get(preset.name, ""),
        paper_flops,
        f"{preset.reported} {preset.data_set.metric}",
        preset.reported_multi_scale or "",
    )
    return f"| {' | '.join(map(str, cells))} |"


def image_size(preset: Preset) -> int:
    """Side of the image, in pixels, for which the original's FLOPs are known."""
    if preset.data_set.task == "panoptic":
        return 800
    return 640 if preset.name in ("ade20k-swin-base", "ade20k-swin-large") else 512


@torch.no_grad()
def multiply_adds(model: torch.nn.Module, image: torch.Tensor, **arguments: bool) -> float:
    """Multiply-adds in matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        model(image, **arguments)
    return counter.get_total_flops() / 2  # torch counts both separately


def main() -> None:
    print(HEADER)
    for preset in PRESETS.values():
        print(row(preset))


if __name__ == "__main__":
    OptionParser(description=__doc__).parse_args()
    main()
