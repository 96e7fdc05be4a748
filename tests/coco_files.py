"""Small data sets in COCO's files, for the tests."""

import json

import numpy as np
from PIL import Image

# Ids with gaps, in another order than the labels.
CATEGORIES = [
    {"id": 184, "name": "tree", "isthing": 0},
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 90, "name": "toothbrush", "isthing": 1},
]


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_image(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (10, 20, 30)).save(path)


def encode_ids(ids):
    """The image of three channels in which COCO stores ids."""
    ids = np.asarray(ids)
    return Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8))


def write_panoptic(root, images, categories=CATEGORIES, split="train"):
    """Writes images {name: (ids (H, W), segments_info)}: annotations/panoptic_SPLIT.json, its PNGs, images/SPLIT."""
    json_path = root / f"annotations/panoptic_{split}.json"
    entries, annotations = [], []
    for number, (name, (ids, segments_info)) in enumerate(images.items(), start=7):
        height, width = np.shape(ids)
        write_image(root / f"images/{split}/{name}.png", (height, width))
        (root / f"annotations/panoptic_{split}").mkdir(parents=True, exist_ok=True)
        encode_ids(ids).save(root / f"annotations/panoptic_{split}/{name}.png")
        entries.append({"id": number, "file_name": f"{name}.png", "height": height, "width": width})
        annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments_info})
    write_json(json_path, {"images": entries, "annotations": annotations[::-1], "categories": categories})
    return json_path


def write_instances(root, images, categories=CATEGORIES, split="train"):
    """Writes images {name: ((H, W), annotations)} as annotations/instances_SPLIT.json and images/SPLIT."""
    json_path = root / f"annotations/instances_{split}.json"
    entries, annotations = [], []
    for number, (name, (size, own_annotations)) in enumerate(images.items(), start=7):
        write_image(root / f"images/{split}/{name}.png", size)
        entries.append({"id": number, "file_name": f"{name}.png", "height": size[0], "width": size[1]})
        annotations += [{"image_id": number, **annotation} for annotation in own_annotations]
    annotations = [{"id": number, **annotation} for number, annotation in enumerate(annotations, start=100)]
    write_json(json_path, {"images": entries, "annotations": annotations, "categories": categories})
    return json_path
