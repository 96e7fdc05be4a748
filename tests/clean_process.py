"""Loads checkpoints through every Auto class that they name and a pipeline; prints, as JSON, whose classes ran.

    python tests/clean_process.py (package | stock | code) FOLDER ...

`package` calls `register_auto_classes`. `stock` and `code` cannot import this package; `code` trusts that of the
checkpoint, and saves what it loaded in FOLDER/again.
"""

import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image


class HidePackage:
    """A finder that knows only that there is no hf_maskformer."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "hf_maskformer":
            raise ModuleNotFoundError(f"{name} is hidden")


class Messages(logging.Handler):
    """Collects what transformers warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("transformers").addHandler(self)
        return self.texts

    def __exit__(self, *_: object) -> None:
        logging.getLogger("transformers").removeHandler(self)


def class_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__name__}"


def report(folder: str, mode: str) -> dict[str, object]:
    with Messages() as messages:
        pipeline = transformers.pipeline("image-segmentation", model=folder, trust_remote_code=mode == "code")
        segments = pipeline(Image.new("RGB", (50, 31), "teal"), subtask="semantic")
    assert segments[0]["mask"].size == (50, 31)
    found = {"pipeline's model": class_name(pipeline.model)}
    found["pipeline's image processor"] = class_name(pipeline.image_processor)

    trust = {"trust_remote_code": True} if mode == "code" else {}
    auto_classes = set(json.loads((Path(folder) / "config.json").read_text())["auto_map"])
    if mode == "stock":
        auto_classes -= {"AutoModelForImageSegmentation"}  # it has none of this type
    for name in sorted(auto_classes - {"AutoConfig"}):
        model, loading_info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **trust)
        found[name] = class_name(model)
        assert not loading_info["missing_keys"] | loading_info["mismatched_keys"]
        assert name == "AutoModel" or not loading_info["unexpected_keys"]
    found["AutoConfig"] = class_name(transformers.AutoConfig.from_pretrained(folder, **trust))
    found["AutoImageProcessor"] = class_name(transformers.AutoImageProcessor.from_pretrained(folder, **trust))

    if mode == "package":
        # What transformers saves without torchvision names another class than what we save.
        transformers.MaskFormerImageProcessorPil().save_pretrained(f"{folder}/transformers")
        from_transformers = transformers.AutoImageProcessor.from_pretrained(f"{folder}/transformers")
        found["image processor that transformers saved"] = class_name(from_transformers)
    if mode == "code":
        pipeline.model.save_pretrained(f"{folder}/again")
        pipeline.image_processor.save_pretrained(f"{folder}/again")
    with torch.no_grad():
        output = pipeline.model(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))
    logits = output.get("masks_queries_logits", output.get("logits"))
    return {"classes": found, "messages": messages, "logits": logits.flatten().tolist()}


if __name__ == "__main__":
    mode, *folders = sys.argv[1:]
    if mode == "package":
        import hf_maskformer

        hf_maskformer.register_auto_classes()
        hf_maskformer.register_auto_classes()
    else:
        sys.meta_path.insert(0, HidePackage())
    print(json.dumps([report(folder, mode) for folder in folders]))
