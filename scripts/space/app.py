"""A Space of the Hub that segments pictures. Its variable CHECKPOINT names another model."""

import os

from hf_maskformer.demo.page import launch

launch(os.environ.get("CHECKPOINT", "facebook/maskformer-swin-tiny-ade"))
