import pytest
import torch
from golden import Golden


@pytest.fixture(scope="module", params=["resnet_semantic", "swin_semantic", "resnet_panoptic_enc"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
