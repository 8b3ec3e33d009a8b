"""hubconf.py through torch.hub itself."""

from pathlib import Path

import pytest
import torch

import hubconf
from model import AlexNet

ROOT = str(Path(hubconf.__file__).parent)


def test_hub_loads_a_fresh_net():
    net = torch.hub.load(ROOT, "alexnet", source="local", num_classes=10, image_size=64)
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_hub_loads_a_checkpoint(run_folder):
    net = torch.hub.load(ROOT, "alexnet", source="local", checkpoint=str(run_folder / "best.pt"))
    content = torch.load(run_folder / "best.pt", weights_only=True)
    same = AlexNet(**content["config"])
    same.load_state_dict(content["model"])
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(net(x), same.eval()(x))
    assert net.classes == content["classes"]
    with pytest.raises(ValueError, match="num_classes"):
        hubconf.alexnet(str(run_folder / "best.pt"), num_classes=3)
