"""What a checkpoint holds (README.md here), how one is read and checked, and the net that it makes.

This is the one place that knows kinds of nets: AlexNet, and the nets of converted weights, Caffe's and torchvision's.
"""

import errno
import importlib.util
import json
import math
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.augment import Augment
from data.loader import lacks_memory
from data.manifest import SHORTER_SIDE, WARPED
from data.pictures import to_square
from model import AlexNet
from utils import Diverged, UserError, one_line, replacing

FOLDER = Path(__file__).resolve().parent
KEYS = (
    "model", "config", "classes", "wnids", "mean", "store_size", "resize", "image_size", "epoch", "step", "best",
    "dataset", "store",
)
# AlexNet's layers with weights, and what they are called in torchvision's net.
LAYERS = {
    "conv1": "features.0", "conv2": "features.3", "conv3": "features.6", "conv4": "features.8", "conv5": "features.10",
    "fc6": "classifier.1", "fc7": "classifier.4", "fc8": "classifier.6",
}
# torchvision's weights were trained on (pixel / 255 - MEAN) / STD (ImageClassification in its transforms).
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def newest(*names: str) -> Path | None:
    """The youngest checkpoints/*/NAME of these names, or None."""
    found = (path for name in names for path in FOLDER.glob(f"*/{name}"))
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


# ---------------------------------------------------------------------------------------------- files


def load_checkpoint(path: str | Path, device="cpu") -> dict:
    """A checkpoint of train.py, checkpoints.convert or checkpoints.export (.safetensors) as a dict. Only plain values
    and tensors are read, never code. Raises UserError for a file that is missing, damaged or something else."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a checkpoint in it, such as {path / 'best.pt'}")
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    open(path, "rb").close()  # raises OSError, which says why, where it can't be read
    safe = path.suffix.lower() == ".safetensors"
    checkpoint = _read_safetensors(path, device) if safe else _read_pt(path, device)
    missing = [key for key in KEYS if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise UserError(f"{path} is no checkpoint of this project: it lacks {', '.join(missing)}")
    wrong = _wrong_entry(checkpoint)
    if wrong:
        raise UserError(f"{path} is no checkpoint of this project, or was changed: invalid {wrong}")
    return checkpoint


def _read_pt(path: Path, device) -> dict:
    if path.suffix.lower() == ".onnx":
        raise UserError(f"{path} is for ONNX Runtime and the like; here take the checkpoint that it was made of")
    try:
        if zipfile.is_zipfile(path):  # other files are for torch to refuse
            check_archive(path)
        with warnings.catch_warnings(action="ignore"):  # torch warns of pickles that it then refuses
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is no checkpoint of this project, or holds code, which is not run") from None
    except Exception as error:  # torch's reader raises nearly anything on files of other kinds
        if lacks_memory(error):
            raise UserError(f"{path}: {device} has too little free memory to load it") from None
        raise UserError(f"{path} is no checkpoint of this project, or is damaged ({type(error).__name__})") from None


def check_archive(path: Path) -> None:
    """Raise ValueError where a .pt file is damaged: its parts carry CRC-32s, which torch does not look at."""
    try:
        with zipfile.ZipFile(path) as file:
            parts = file.infolist()
            packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
            if packed or sum(part.file_size for part in parts) > path.stat().st_size:
                raise ValueError("it claims to hold more than it does")
            damaged = file.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, struct.error) as error:  # all zipfile's
        raise ValueError(one_line(error)) from None
    if damaged:
        raise ValueError(f"the checksum of its part {damaged} does not match")


def save_checkpoint(path: Path, checkpoint: dict, previous: Path | None = None) -> None:
    """Write a checkpoint, whole or not at all, and read it back; what was there becomes `previous`. Raises Diverged
    where a weight is not finite, UserError where it can't be written; the old file stays."""
    for name, tensor in checkpoint["model"].items():
        if not torch.isfinite(tensor).all():
            raise Diverged(f"{name} is no longer finite at step {checkpoint['step']}; {path} was not written")

    def ready(written: Path) -> None:
        try:
            check_archive(written)
        except ValueError as error:
            raise OSError(errno.EIO, f"what was written does not read back, {error}") from None
        if previous and path.exists():
            keep_as(path, previous)

    with replacing(path, ready) as file:
        torch.save(checkpoint, file)


def keep_as(path: Path, name: Path) -> None:
    """Give a file a second name, or where the file system has no hard links, that name instead."""
    name.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(path), name)
    except OSError:
        path.replace(name)


def _read_safetensors(path: Path, device) -> dict:
    needs_package("safetensors")
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            checkpoint = dict(json.loads(file.metadata()["alexnet"]))
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        wanted = checkpoint.pop("crc32", None)
        if wanted not in (None, weights_checksum(checkpoint, tensors)):
            raise ValueError("checksum")
        if checkpoint.get("best", 0) is None:
            checkpoint["best"] = math.inf
        return checkpoint | {"mean": tensors.pop("mean"), "model": tensors, "store": ""}
    except Exception as error:  # of its own kinds; and what a header of another kind brings about
        raise UserError(f"{path} is no checkpoint of this project, or is damaged ({type(error).__name__})") from None


def weights_checksum(about: dict, tensors: dict[str, Tensor]) -> int:
    """CRC-32 of what a .safetensors file holds: the format itself has none, and a flipped bit would be another net."""
    found = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), found)
        found = zlib.crc32(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy(), found)
    return found


def needs_package(name: str) -> None:
    """Raise UserError where an optional package is missing."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"this needs the package {name}: pip install -r checkpoints/requirements.txt")


def _wrong_entry(c: dict) -> str | None:
    """The first entry of a checkpoint that does not fit the others."""
    sides = all(isinstance(c[name], int) and c[name] > 0 for name in ("store_size", "image_size"))
    count = len(c["classes"]) if _are_words(c["classes"]) else 0
    mean = c["mean"]
    checks = {
        "model": isinstance(c["model"], dict) and all(map(is_plain, c["model"].values())),
        "config": isinstance(c["config"], dict),
        "classes": count > 0,
        "wnids": c["wnids"] is None or (_are_words(c["wnids"]) and len(c["wnids"]) == count),
        "epoch, step or best": all(isinstance(c[name], int) for name in ("epoch", "step"))
        and isinstance(c["best"], int | float) and not math.isnan(c["best"]),
        "image_size or store_size": sides and c["image_size"] <= c["store_size"],
        "resize": c["resize"] in (SHORTER_SIDE, WARPED),
        "dataset or store": isinstance(c["store"], str) and isinstance(c["dataset"], str),
        "mean": is_plain(mean) and mean.dtype == torch.float32 and mean.ndim == 3 and mean.shape[2] in (1, 3)
        and mean.shape[0] == mean.shape[1] and mean.shape[0] in (1, c["store_size"]) and bool(mean.isfinite().all()),
    }
    wrong = next((name for name, right in checks.items() if not right), None)
    if wrong:
        return wrong
    fits = (c["config"].get("num_classes"), c["config"].get("image_size")) == (count, c["image_size"])
    return None if fits else "config"


def is_plain(tensor) -> bool:
    """A dense tensor of floats, in memory, with as many numbers as its shape asks for."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    enough = tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    return enough and tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _are_words(value) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def load_model(path: str | Path, device="cpu"):
    """(model, prepare) of a checkpoint. model: the net in eval mode, with a list `classes`. prepare: a function from
    one PIL picture, or a list of them, to the model's input, (n, 3, S, S) float: resized, cropped, mean subtracted
    as in training; prepare(pictures, ten_crop=True) gives ten such inputs. Raises UserError for a bad file."""
    checkpoint = load_checkpoint(path, device)
    model = build_net(checkpoint, path).to(device).eval()
    model.classes = checkpoint["classes"]
    mean, size = checkpoint["mean"], checkpoint["store_size"]
    augment = Augment(checkpoint["image_size"], mean, device=device)

    def prepare(pictures, ten_crop: bool = False):
        pictures = pictures if isinstance(pictures, list | tuple) else [pictures]
        stored = np.stack([to_square(p, size, mean.shape[2], checkpoint["resize"]) for p in pictures])
        images = torch.from_numpy(stored).to(device)
        return list(augment.ten_crop(images)) if ten_crop else augment.center(images)

    return model, prepare


def load_member(path: str | Path, device, ten_crop: bool = False):
    """(net, views, checkpoint): the net in eval mode, what it looks at of stored pictures (as utils.evaluate takes it),
    and the rest of the checkpoint."""
    checkpoint = load_checkpoint(path, device)
    net = build_net(checkpoint, path).to(device, memory_format=torch.channels_last).eval()
    del checkpoint["model"]  # the net has the weights
    augment = Augment(checkpoint["image_size"], checkpoint["mean"], device=device)
    return net, partial(augment.views, ten_crop=ten_crop), checkpoint


# ---------------------------------------------------------------------------------------------- nets


def build_net(checkpoint: dict, path: str | Path) -> nn.Module:
    """The net of a checkpoint with its weights; `config` rebuilds it. Raises UserError, naming `path`, where they do
    not fit or are not finite."""
    try:
        with torch.device("meta"):  # before memory is taken for a net that the weights don't fit
            wanted = {name: tensor.shape for name, tensor in new_net(checkpoint["config"]).state_dict().items()}
        found = {name: tensor.shape for name, tensor in checkpoint["model"].items()}
        if wanted != found:
            name = next(name for name in wanted | found if wanted.get(name) != found.get(name))
            raise ValueError(f"{name} is {tuple(found.get(name, ()))}, not {tuple(wanted.get(name, ()))}")
        net = new_net(checkpoint["config"])
        net.load_state_dict(checkpoint["model"])
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        if lacks_memory(error):
            raise
        raise UserError(f"{path}: the weights do not fit the net: {one_line(error)}") from None
    if not all(parameter.isfinite().all() for parameter in net.parameters()):
        raise UserError(f"{path} holds weights that are not finite; it is damaged")
    return net


def new_net(config: dict) -> nn.Module:
    """The net that a checkpoint's config describes, freshly initialised. Raises ValueError or TypeError for a config
    that describes none."""
    options = dict(config)
    kind = options.pop("net", "alexnet")
    if kind == "alexnet":
        return AlexNet(**options)
    if kind == "caffe":
        return caffe_net(options)
    if kind == "torchvision":
        return torchvision_net(**options)
    raise ValueError(f"unknown net {kind}")


def caffe_net(options: dict) -> nn.Module:
    """AlexNet with the dropout that Caffe's weights were trained with: rescaled in training, no factor in testing."""
    net = AlexNet(**options)
    net.drop6, net.drop7 = nn.Dropout(net.drop6.p), nn.Dropout(net.drop7.p)
    net.config["net"] = "caffe"
    return net


def torchvision_net(num_classes: int, image_size: int, dropout: float = 0.5) -> nn.Module:
    """torchvision's alexnet, another net than the paper's, for pixels of 0..255 minus 255 MEAN: it divides them by 255
    STD itself. (Folded into conv1's weights, that division would leave them 58 times smaller and their gradient 58
    times larger, and no learning rate would suit both conv1 and the rest.)"""
    from torchvision.models import alexnet

    net = alexnet(num_classes=num_classes, dropout=dropout)
    net.register_buffer("scale", 255 * torch.tensor(STD).view(3, 1, 1), persistent=False)
    net.register_forward_pre_hook(_divide)
    net.config = {"net": "torchvision", "num_classes": num_classes, "image_size": image_size, "dropout": dropout}
    return net


def _divide(net: nn.Module, inputs: tuple) -> Tensor:
    return inputs[0] / net.scale


def describe_net(net: nn.Module) -> str:
    """A net's kind in words."""
    config = net.config
    if config.get("net") == "torchvision":
        return "torchvision's alexnet (another net than the paper's)"
    columns = "one column" if config["columns"] == 1 else "two columns"
    order = ", in the order of the 2012 code" if config["order"] == "2012" else ""
    caffe = " with Caffe's dropout" if "net" in config else ""
    dropout = "" if config.get("dropout", True) else ", without dropout"
    return f"AlexNet{caffe}, {columns}{order}{dropout}"


def take_weights(net: nn.Module, checkpoint: dict, path: str | Path, classes: list[str], wnids) -> str:
    """Start a net for `classes` from a checkpoint's weights, and return a warning or "". The last layer stays where the
    names of the classes, or their wnids, are the same; its rows change places where these come in another order;
    otherwise it stays as initialised. Raises UserError where the weights do not fit."""
    weights = dict(checkpoint["model"])
    last = list(net.state_dict())[-1].rpartition(".")[0]  # fc8; torchvision's is classifier.6
    rows, warning = _rows_of(checkpoint, classes, wnids), ""
    initial = net.state_dict()
    for part in (f"{last}.weight", f"{last}.bias"):
        if rows is None:
            weights[part] = initial[part]
            warning = f"--init {path} has other classes than this run, so {last} starts afresh"
        elif part in weights and len(weights[part]) == len(rows):
            weights[part] = weights[part][rows]
    try:
        net.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"--init {path}: the weights do not fit: {one_line(error)}") from None
    if not all(parameter.isfinite().all() for parameter in net.parameters()):
        raise UserError(f"--init {path} holds weights that are not finite; it is damaged")
    return warning


def layer_called(net: nn.Module, name: str) -> nn.Module:
    """The layer of any kind of net that has the place of AlexNet's conv1 ... fc8."""
    return net.get_submodule(LAYERS[name] if net.config.get("net") == "torchvision" else name)


def freeze(net: nn.Module, layer: str) -> None:
    """Let a layer, called as AlexNet's is, and all before it keep what they have learnt: they get no gradients."""
    places = list(LAYERS.values() if net.config.get("net") == "torchvision" else LAYERS)
    following = places[list(LAYERS).index(layer) + 1]
    for name, module in net.named_modules():  # in their order
        if name == following:
            return
        if not list(module.children()):
            module.requires_grad_(False)


def watch_features(net: nn.Module) -> list[Tensor]:
    """A list to which each forward pass from now on adds what the last layer sees, (n, 4096) float32 on the CPU: in
    testing fc7's outputs after their activation, times 0.5 where dropout was the paper's."""
    seen = []
    layer_called(net, "fc8").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().cpu()))
    return seen


def _rows_of(checkpoint: dict, classes: list[str], wnids: list[str] | None) -> list[int] | None:
    """Which row of the checkpoint's last layer each class has; None where the classes are others."""
    for theirs, ours in ((checkpoint["wnids"], wnids), (checkpoint["classes"], classes)):
        if theirs and theirs == ours:
            return list(range(len(ours)))
        if theirs and ours and sorted(theirs) == sorted(ours) and len(set(ours)) == len(ours):
            return [theirs.index(word) for word in ours]
    return None
