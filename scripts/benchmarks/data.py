"""Building training batches from files: reading, the paper's augmentation for ADE20K, collation."""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from hf_maskformer import MaskFormerDataCollator, MaskFormerImageProcessor
from hf_maskformer.data.augmentation import RandomScaleCropFlip
from hf_maskformer.data.augmented import generator_of
from hf_maskformer.data.folder import SegmentationFolder
from hf_maskformer.data.generated_scenes import write_generated_scenes

from .images import stock_image_processors
from .measuring import Comparison


def data(arguments: argparse.Namespace) -> Iterator[Comparison]:
    """A batch of drawn scenes on disk. Reading and augmentation are ours in all; each then builds its own targets."""
    augmentation = RandomScaleCropFlip.from_scales(arguments.size, 0.5, 2.0)
    collate = MaskFormerDataCollator(MaskFormerImageProcessor(ignore_index=255), do_resize=False)
    with TemporaryDirectory() as folder:
        write_scenes(Path(folder), arguments.batch, (arguments.size, arguments.size * 4 // 3))
        scenes = SegmentationFolder(folder, "train")

        def read() -> list[Any]:
            return [augmentation(scenes[index], generator_of(index)) for index in range(arguments.batch)]

        def make_stock_batch(processor: Any) -> object:
            samples = read()
            maps = [sample["segmentation_map"] for sample in samples]
            return processor([sample["image"] for sample in samples], segmentation_maps=maps, return_tensors="pt")

        stock = stock_image_processors(ignore_index=255, do_resize=False)
        peers = {name: partial(make_stock_batch, processor) for name, processor in stock.items()}
        yield "data", {**peers, "ours": lambda: collate(read()), "reading": read}


def write_scenes(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Writes drawn scenes as JPEG, as photographs are stored, which is faster to read than PNG."""
    write_generated_scenes(folder, num_train=count, num_val=1, image_size=size)
    for path in (folder / "images/train").iterdir():
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
