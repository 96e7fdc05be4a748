"""Loads a checkpoint through every Auto class and a pipeline and prints, as JSON, whose classes ran.

    python tests/clean_process.py FOLDER (package | stock | code)

`package` calls `register_auto_classes`. `stock` and `code` cannot import this package; `code` trusts that of the
checkpoint, and saves what it loaded in FOLDER/again.
"""

import json
import logging
import sys

import torch
import transformers
from PIL import Image

# transformers itself has none of this type for image segmentation.
AUTO_MODELS = {
    "package": ["AutoModel", "ImageSegmentation", "InstanceSegmentation", "UniversalSegmentation"],
    "stock": ["AutoModel", "InstanceSegmentation", "UniversalSegmentation"],
}
AUTO_MODELS["code"] = AUTO_MODELS["package"]


class HidePackage:
    """A finder that knows only that there is no hf_maskformer."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "hf_maskformer":
            raise ModuleNotFoundError(f"{name} is hidden")


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def class_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__name__}"


def report(folder: str, mode: str) -> dict[str, object]:
    trust = {"trust_remote_code": True} if mode == "code" else {}
    messages = Messages()
    logging.getLogger("transformers").addHandler(messages)
    pipeline = transformers.pipeline("image-segmentation", model=folder, trust_remote_code=mode == "code")
    segments = pipeline(Image.new("RGB", (50, 31), "teal"), subtask="semantic")
    assert segments[0]["mask"].size == (50, 31)
    logging.getLogger("transformers").removeHandler(messages)
    found = {"pipeline's model": class_name(pipeline.model)}
    found["pipeline's image processor"] = class_name(pipeline.image_processor)
    found["AutoConfig"] = class_name(transformers.AutoConfig.from_pretrained(folder, **trust))
    found["AutoImageProcessor"] = class_name(transformers.AutoImageProcessor.from_pretrained(folder, **trust))
    for name in AUTO_MODELS[mode]:
        auto_class = getattr(transformers, name if name == "AutoModel" else f"AutoModelFor{name}")
        model, loading_info = auto_class.from_pretrained(folder, output_loading_info=True, **trust)
        found[auto_class.__name__] = class_name(model)
        assert not loading_info["missing_keys"] | loading_info["mismatched_keys"]
        assert name == "AutoModel" or not loading_info["unexpected_keys"]

    if mode == "code":
        pipeline.model.save_pretrained(f"{folder}/again")
        pipeline.image_processor.save_pretrained(f"{folder}/again")
    with torch.no_grad():
        logits = pipeline.model(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)).masks_queries_logits
    return {"classes": found, "messages": messages.texts, "logits": logits.flatten().tolist()}


if __name__ == "__main__":
    folder, mode = sys.argv[1:]
    if mode == "package":
        import hf_maskformer

        hf_maskformer.register_auto_classes()
        hf_maskformer.register_auto_classes()
    else:
        sys.meta_path.insert(0, HidePackage())
    print(json.dumps(report(folder, mode)))
