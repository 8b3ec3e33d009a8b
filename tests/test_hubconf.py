"""hubconf.py through torch.hub itself."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hubconf
from model import AlexNet

ROOT = str(Path(hubconf.__file__).parent)


def test_hub_loads_a_fresh_net():
    net = torch.hub.load(ROOT, "alexnet", source="local", num_classes=10, image_size=64)
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_hub_lists_the_net_alone():
    """torch.hub.list shows all that can be called and has no underscore; it takes no folder on this machine."""
    callables = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")]
    assert callables == ["alexnet"]


USERS = """
import sys, torch
import model, utils, checkpoints, data.own
import model as before
for more in ({"num_classes": 10, "image_size": 64}, {"checkpoint": sys.argv[2]}, {"num_classes": 2, "image_size": 64}):
    net = torch.hub.load(sys.argv[1], "alexnet", source="local", **more)
    assert net(torch.zeros(1, 3, net.config["image_size"], net.config["image_size"])).ndim == 2
import model, kernels, data.late
assert model is before and (model.WHOSE, utils.WHOSE, checkpoints.WHOSE, kernels.WHOSE) == ("user",) * 4
assert data.own.WHOSE == data.late.WHOSE == "user"
assert not [path for path in sys.path if path == sys.argv[1]]
"""


def test_a_users_own_modules_are_left_alone(run_folder, tmp_path):
    """A program with modules called model, utils, checkpoints, kernels and a package data, some imported before, some
    after: nets come out of the hub, with and without a checkpoint, and the program keeps its modules."""
    (tmp_path / "data").mkdir()
    for name in ("model", "utils", "checkpoints", "kernels", "data/own", "data/late"):
        (tmp_path / f"{name}.py").write_text('WHOSE = "user"\n')
    (tmp_path / "program.py").write_text(USERS)
    command = [sys.executable, "program.py", ROOT, str(run_folder / "best.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
