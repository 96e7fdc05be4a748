"""Random colour jitter in the order of SSD (arXiv 1512.02325), as in the paper's training."""

import torch
from PIL import Image

BRIGHTNESS = 32
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 36  # degrees


def color_jitter(image: Image.Image, generator: torch.Generator | None = None) -> Image.Image:
    """Changes brightness, contrast, saturation and hue of an RGB image, each with probability one half.

    Brightness comes first; contrast follows it or comes last, with equal probability. Values are clipped to 0 to 255
    after each step.
    """
    image = _change_brightness(image, generator)
    contrast_is_early = _coin(generator)
    if contrast_is_early:
        image = _change_contrast(image, generator)
    image = _shift_hue_and_saturation(image, generator)
    return image if contrast_is_early else _change_contrast(image, generator)


def _change_brightness(image: Image.Image, generator: torch.Generator | None) -> Image.Image:
    if not _coin(generator):
        return image
    shift = _uniform(-BRIGHTNESS, BRIGHTNESS, generator)
    return image.point([_to_byte(value + shift) for value in range(256)] * 3)


def _change_contrast(image: Image.Image, generator: torch.Generator | None) -> Image.Image:
    if not _coin(generator):
        return image
    factor = _uniform(*CONTRAST, generator)
    return image.point([_to_byte(value * factor) for value in range(256)] * 3)


def _shift_hue_and_saturation(image: Image.Image, generator: torch.Generator | None) -> Image.Image:
    factor = _uniform(*SATURATION, generator) if _coin(generator) else 1.0
    # In whole steps of two degrees; in Pillow a full turn is 256.
    turn = 2 * _integer(-HUE // 2, HUE // 2, generator) / 360 * 256 if _coin(generator) else 0.0
    if factor == 1 and turn == 0:
        return image
    hues = [int(value + turn) % 256 for value in range(256)]
    saturations = [_to_byte(value * factor) for value in range(256)]
    return image.convert("HSV").point(hues + saturations + list(range(256))).convert("RGB")


def _to_byte(value: float) -> int:
    return min(max(int(value), 0), 255)


def _coin(generator: torch.Generator | None) -> bool:
    return torch.rand((), generator=generator).item() < 0.5


def _uniform(low: float, high: float, generator: torch.Generator | None) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _integer(low: int, high: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))
