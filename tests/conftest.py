import logging
import os

import pytest
import torch
from golden import Golden

from hf_maskformer import loss_maskformer, loss_maskformer_logits, loss_maskformer_masks

# Scripts that tests start as processes of their own; pyproject.toml says it of what runs within the tests.
os.environ["PYTHONWARNINGS"] = "error::DeprecationWarning:__main__,error::FutureWarning:__main__"


@pytest.fixture(scope="module", params=["resnet_semantic", "swin_semantic", "resnet_panoptic_enc"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(params=["CPU", "GPU"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the criterion works: in parts for the cache of a CPU or, on a CPU too, all at once as on a GPU."""
    if request.param == "GPU":
        for module in (loss_maskformer, loss_maskformer_logits, loss_maskformer_masks):
            monkeypatch.setattr(module, "prefers_small_chunks", lambda device: False)
    return request.param


@pytest.fixture
def transformers_log(caplog):
    """What transformers logs; it keeps that from the root logger."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
