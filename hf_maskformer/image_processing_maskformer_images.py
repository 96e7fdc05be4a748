"""Images of any kind into one tensor: reading, resizing, normalising, padding.

B images of h x w pixels, H x W the padded size of the batch. Pixels stay uint8 until they are written to the batch.
"""

import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import get_session
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .image_processing_maskformer_settings import RESAMPLING, ImageProcessorSettings
from .post_processing_maskformer_inputs import Size

# Pillow detects some fifty formats by content, whatever a file is called, and passes one of them to Ghostscript.
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Key in an image's `info` for the bits of grey it was stored with, which Pillow scales to 0 to 255.
BITS = "hf_maskformer_bits"

MAX_DOWNLOAD_BYTES = 100 * 2**20
MAX_DOWNLOAD_SECONDS = 60.0


def enumerate_items(name: str, items: Any, num_dimensions: int) -> Iterator[tuple[int, Any]]:
    """Numbers the items of a list or of a stacked array; anything else is one item."""
    if items is None:
        raise ValueError(f"{name} is None; give at least one image.")
    if isinstance(items, np.ndarray | Tensor) and items.ndim > num_dimensions:
        items = list(items)
    if not isinstance(items, list | tuple):
        items = [items]
    if len(items) == 0:
        raise ValueError(f"{name} is empty; give at least one image.")
    return enumerate(items)


def read_image(image: Any, index: int, input_data_format: str | None = None) -> Tensor:
    """Reads image `index`, in any form that `MaskFormerImageProcessor.preprocess` takes: (3, h, w), uint8 or float32.

    Files are rotated upright by their EXIF tag; PIL images are used as they are, since maps may come with them.

    Raises:
        ValueError: it is damaged, too large for Pillow's limit, not an image, behind a URL that `download_image` does
            not read, has a wrong shape, or its values are wide integers other than uint16 or not finite.
    """
    if isinstance(image, str | Path | Image.Image):
        source = "" if isinstance(image, Image.Image) else f" ({image})"
        try:
            opened = image if isinstance(image, Image.Image) else read_upright(image)
            decoded = np.array(to_rgb(opened))  # (h, w, 3) uint8
        # Decoders report damage by OSError, SyntaxError, struct.error and more, HTTP clients by errors of their own.
        except Exception as error:
            raise ValueError(f"Image {index}{source} cannot be read: {error}") from error
        return torch.from_numpy(decoded).permute(2, 0, 1)
    if not isinstance(image, np.ndarray | Tensor):
        kind = type(image).__name__
        raise ValueError(f"Image {index} is a {kind}; give a PIL image, an array, a tensor, a path or a URL.")
    pixels = image.detach() if isinstance(image, Tensor) else _as_tensor(image, f"Image {index}")
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim == 3 and _channels_are_last(tuple(pixels.shape), input_data_format):
        pixels = pixels.permute(2, 0, 1)
    if pixels.ndim != 3 or len(pixels) not in (1, 3, 4) or pixels.numel() == 0:
        raise ValueError(
            f"Image {index} has shape {tuple(image.shape)}; give (height, width), or height, width and 1, 3 or 4 "
            "channels, which may come first or last."
        )
    pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]
    if pixels.dtype == torch.uint16:
        return to_eight_bits(pixels)
    if pixels.dtype == torch.bool:
        return pixels.to(torch.uint8) * 255
    if pixels.dtype == torch.uint8:
        return pixels
    if not pixels.is_floating_point():
        raise ValueError(
            f"Image {index} holds {image.dtype}, which does not say which value is white; give uint8 (0 to 255), "
            "uint16 (0 to 65535) or floats."
        )
    pixels = pixels.float()
    if not pixels.isfinite().all():
        raise ValueError(f"Image {index} contains NaN or infinity; replace these pixels.")
    return pixels


def _as_tensor(array: np.ndarray, name: str) -> Tensor:
    if array.dtype.kind not in "buif":
        raise ValueError(f"{name} holds {array.dtype}; give uint8, uint16 or floats.")
    # torch supports only the machine's byte order.
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def to_eight_bits(pixels: Tensor) -> Tensor:
    """Scales uint16 to uint8: 65535, which is white, becomes 255."""
    return (pixels.float() / 257 + 0.5).to(torch.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a PIL image of any 8-bit mode, or of 16-bit grey. Raises ValueError for modes I and F."""
    if image.mode.startswith("I;16"):
        # Pillow would clip these at 255, which leaves an almost white image.
        image = Image.fromarray(to_eight_bits(_as_tensor(np.asarray(image), "The image")).numpy())
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} does not say which values are black and white; convert it to RGB.")
    if image.mode == "La":  # Pillow converts it to LA only
        image = image.convert("LA")
    return image if image.mode == "RGB" else image.convert("RGB")


def read_upright(source: str | Path) -> Image.Image:
    """The upright image of a file or URL, in its own mode. Raises errors of Pillow and of the HTTP client."""
    return download_image(str(source)) if is_url(source) else ImageOps.exif_transpose(open_image(source))


def open_image(file: str | Path | IO[bytes]) -> Image.Image:
    """Opens a file in one of the `IMAGE_FORMATS`. Raises errors of Pillow, of many kinds."""
    Image.init()  # not every build of Pillow has all of them
    formats = [name for name in IMAGE_FORMATS if name in Image.OPEN]
    try:
        image: Any = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        # Pillow's own message names an object in memory.
        raise UnidentifiedImageError(f"cannot identify it as one of {', '.join(formats)}") from None
    # Pillow drops this once an image is loaded.
    arguments = image.tile[0][3] if image.mode == "L" and image.tile else ""
    raw_mode = arguments if isinstance(arguments, str) else next(iter(arguments or ()), "")
    bits = re.match("L;([24])", str(raw_mode))
    if bits is not None:
        image.info[BITS] = int(bits[1])
    return image


def stored_values(image: Image.Image) -> np.ndarray:
    """The values (h, w) or (h, w, C) of an image from `open_image` as stored in the file."""
    values = np.array(image)
    bits = image.info.get(BITS)
    return values if bits is None else values // (255 // (2**bits - 1))


def is_url(source: str | Path) -> bool:
    """Whether an image is behind a URL and not in a file. Raises a ValueError unless that is http or https."""
    scheme = re.match(r"([a-z][a-z0-9+.-]+)://", str(source), re.IGNORECASE)
    if isinstance(source, Path) or scheme is None:
        return False
    if scheme[1].lower() not in ("http", "https"):
        raise ValueError(f"images are read over http and https, not {scheme[1]}. Download it, and give the path.")
    return True


def download_image(url: str, seconds: float = MAX_DOWNLOAD_SECONDS) -> Image.Image:
    """The upright image behind an http(s) URL, in its own mode: transformers' `load_image` would clip 16 bits at 255.

    Raises:
        OSError: it has not arrived after so many seconds, or is larger than `MAX_DOWNLOAD_BYTES`.
        Exception: of the HTTP client and of Pillow, of many kinds.
    """
    answers: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def fetch() -> None:
        try:
            answers.put(_download(url, seconds))
        except Exception as error:
            answers.put(error)

    # The client's own timeouts are per chunk: a server that sends its header byte by byte would hold us for days.
    threading.Thread(target=fetch, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"it has not arrived after {seconds:g} seconds") from None
    if isinstance(answer, Exception):
        raise answer
    return ImageOps.exif_transpose(open_image(BytesIO(answer)))


def _download(url: str, seconds: float) -> bytes:
    end = time.monotonic() + seconds
    content = bytearray()
    # Decompressing a chunk of a compressed response could take any amount of memory.
    with get_session().stream("GET", url, timeout=seconds, headers={"Accept-Encoding": "identity"}) as response:
        response.raise_for_status()
        for piece in response.iter_raw():
            content += piece
            if len(content) > MAX_DOWNLOAD_BYTES:
                raise OSError(f"it is larger than {MAX_DOWNLOAD_BYTES // 2**20} MiB")
            if time.monotonic() > end:
                raise TimeoutError(f"it has not arrived after {seconds:g} seconds")
    return bytes(content)


def _channels_are_last(shape: tuple[int, ...], input_data_format: str | None) -> bool:
    if input_data_format is not None:
        order = getattr(input_data_format, "value", input_data_format)
        if order not in ("channels_first", "channels_last"):
            raise ValueError(f'input_data_format is {order!r}; give "channels_first" or "channels_last".')
        return order == "channels_last"
    # Three channels are the most likely, then grey and RGBA; where both ends fit, channels come first.
    counts = [count for count in (3, 1, 4) if count in (shape[0], shape[-1])]
    return bool(counts) and shape[0] != counts[0]


def resize_image(image: Tensor, size: Size, resample: int) -> Tensor:
    """Resizes images (..., 3, h, w), uint8 or float, with the antialiased filter of this number in PIL.

    Bilinear uint8 results are within two levels of PIL's, nearly all within one.
    """
    if size_of(image) == size:
        return image
    if RESAMPLING[resample] == "nearest":
        for axis, length in ((-1, size[1]), (-2, size[0])):
            positions = torch.from_numpy(nearest_positions(image.shape[axis], length))
            image = image.index_select(axis, positions.to(image.device))
        return image
    batch = image if image.ndim == 4 else image[None]
    if image.dtype == torch.uint8 and image.device.type != "cpu":  # torch resizes uint8 on the CPU only
        batch = batch.float()
    resized = F.interpolate(batch, size, mode=RESAMPLING[resample], antialias=True, align_corners=False)
    if resized.dtype != image.dtype:
        resized = resized.round_().clamp_(0, 255)
    return resized if image.ndim == 4 else resized[0]


def resize_nearest(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Resizes (..., h, w) of any type to (..., H, W): each pixel takes the value at its centre, as in PIL."""
    for axis, length in ((-1, size[1]), (-2, size[0])):
        if pixels.shape[axis] != length:
            positions = nearest_positions(pixels.shape[axis], length)
            pixels = pixels.take(positions, axis, mode="clip")  # faster than checking bounds
    return pixels


def nearest_positions(length: int, new_length: int) -> np.ndarray:
    """The source pixel of each pixel of a resized axis, (new_length,) int64."""
    step = length / new_length
    # Accumulated step by step as PIL does, so that a centre between two pixels falls on the same side.
    centres = np.cumsum([step / 2] + [step] * (new_length - 1))
    return centres.astype(np.int64)


def make_batch(
    images: Sequence[Tensor],
    sizes: Sequence[Size],
    padded_size: Size,
    settings: ImageProcessorSettings,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Resizes images (3, h, w) to their sizes and makes one normalised and padded batch, with its mask."""
    factor = settings.rescale_factor if settings.do_rescale else 1.0
    mean, std = (settings.image_mean, settings.image_std) if settings.do_normalize else ([0.0] * 3, [1.0] * 3)
    # (pixel * factor - mean) / std, with two passes over the pixels instead of three.
    scales = [factor / deviation for deviation in std]
    shifts = [average / deviation for average, deviation in zip(mean, std, strict=True)]
    # Whatever the default dtype and device are.
    scale, shift = (
        torch.tensor(values, dtype=torch.float32, device=device or "cpu")[:, None, None] for values in (scales, shifts)
    )
    data = empty_batch(sizes, padded_size, device)
    for indices in _alike(images, sizes, device):
        # Moved before they are resized and converted to float: uint8 is a quarter of that.
        stacked = torch.stack([images[index] for index in indices]) if len(indices) > 1 else images[indices[0]][None]
        height, width = sizes[indices[0]]
        resized = resize_image(stacked.to(device or "cpu"), (height, width), settings.resample)
        for index, image in zip(indices, resized, strict=True):
            _write_normalized(data["pixel_values"][index, :, :height, :width], image, scale, shift)
    return data


def _write_normalized(place: Tensor, image: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Writes an image (3, h, w), times a scale minus a shift (3, 1, 1), to its place in a batch."""
    if image.dtype == torch.uint8 and place.device.type == "cpu":
        # With numpy, on one thread: torch's threads synchronise after each of these short operations, and where other
        # programs are running, they wait for each other a hundred times as long as an operation takes.
        pixels = place.numpy()
        pixels[...] = image.numpy()
        pixels *= scale.numpy()
        pixels -= shift.numpy()
    else:
        place.copy_(image).mul_(scale).sub_(shift)


def empty_batch(sizes: Sequence[Size], padded_size: Size, device: str | torch.device | None = None) -> dict[str, Any]:
    """A batch for images of these sizes: all pixels 0, the mask filled in."""
    # All zeroed, although images overwrite most of it: filling a fresh tensor sequentially is many times faster than
    # first touching its pages here and there, as zeroing the padding alone would.
    pixel_values = zeros((len(sizes), 3, *padded_size), torch.float32, device)
    pixel_mask = zeros((len(sizes), *padded_size), torch.int64, device)
    for mask, (height, width) in zip(pixel_mask, sizes, strict=True):
        within = mask[:height, :width]
        (within.numpy() if within.device.type == "cpu" else within)[:] = 1  # on one thread, as in `_write_normalized`
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask}


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device | None = None) -> Tensor:
    """`torch.zeros`, on a CPU in memory that numpy requests in huge pages."""
    if torch.device(device or "cpu").type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, dtype=str(dtype).removeprefix("torch.")))


def _alike(images: Sequence[Tensor], sizes: Sequence[Size], device: str | torch.device | None) -> list[list[int]]:
    """Groups the indices of images that can be resized in one go. A CPU is faster with one at a time."""
    if torch.device(device or "cpu").type == "cpu":
        return [[index] for index in range(len(images))]
    groups: dict[tuple, list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault((image.shape, image.dtype, image.device, sizes[index]), []).append(index)
    return list(groups.values())


def size_of(pixels: Tensor) -> Size:
    """(height, width)."""
    return pixels.shape[-2], pixels.shape[-1]
