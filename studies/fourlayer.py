"""cuda-convnet's four-layer nets for CIFAR-10, their update and their pictures: what studies.cifar2012 (the paper's
section 3.3) and studies.figure1 share.

Two convolutions, two locally connected layers, a dense layer to the classes: layers-conv-local-13pct.cfg and -11pct.cfg
with their layer-params files. What these leave out is cuda-convnet's own: batches of 128 and crops from 9 x 9 places
(convnet.py), the 1 in the normalisation and pools that round up (its kernels, layer.py), ten views (convdata.py).
"""

import itertools
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoints
import utils
from data.augment import Augment, epoch_tables
from data.loader import Loader, lacks_memory
from data.store import Store
from model import LocalResponseNorm, activation
from recipe import set_rate
from train import train_step
from utils import Diverged, Progress, UserError, shown
from watch import LOOK_EVERY, Watch

STD = {"conv1": 0.0001, "conv2": 0.01, "local3": 0.04, "local4": 0.04, "fc10": 0.01}  # of the weights at the start
RATE, MOMENTUM, BATCH, LOCAL_DECAY = 0.001, 0.9, 128, 0.004
BIASES = 2  # their learning rate, times the weights'
STORED, CROP = 32, 24  # pixels


# ---------------------------------------------------------------------------------------------- the nets


class LocallyConnected(nn.Module):
    """A 3 x 3 convolution with padding 1 that has a filter of its own at each place: (n, channels, side, side) to (n,
    filters, side, side).

    weight: (side * side, 9 * channels, filters), by place, then by row, column and channel of the window; bias: (side *
    side, filters).
    """

    def __init__(self, channels: int, filters: int, side: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(side * side, 9 * channels, filters))
        self.bias = nn.Parameter(torch.zeros(side * side, filters))

    def reset_parameters(self) -> None:
        """As torch.nn.Conv2d does: all uniform, up to 1 / sqrt(fan_in)."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        padded = F.pad(x, (1, 1, 1, 1)).permute(2, 3, 0, 1)  # (side + 2, side + 2, n, channels)
        shifts = itertools.product(range(3), repeat=2)
        windows = torch.cat([padded[row : row + height, column : column + width] for row, column in shifts], 3)
        outputs = torch.baddbmm(self.bias[:, None], windows.flatten(0, 1), self.weight)  # a product for each place
        return outputs.permute(1, 2, 0).unflatten(2, (height, width))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1] // 9}, {self.weight.shape[2]}, places={self.weight.shape[0]}"


def build(
    lrn: bool, filters: int, act: str = "relu", side: int = CROP, classes: int = 10, init: str = "file"
) -> nn.Sequential:
    """The net, freshly initialised from torch's generator, for (n, 3, side, side), 0..255 minus the mean. init: the
    files' standard deviations, or "pytorch": as torch.nn initialises layers of itself. With the default side of 24:
    1,116,490 parameters with 32 filters in local3, 2,112,970 with 64."""
    half = math.ceil((side - 1) / 2)  # pools round up
    quarter = math.ceil((half - 1) / 2)
    # The files have each activation before its pool. Activations never fall, so after the pool they give the same
    # numbers, at a quarter of the work.
    second = {"pool2": max_pool(), "act2": activation(act)}
    if lrn:
        second = {"act2": activation(act), "norm2": normalisation(), "pool2": max_pool()}
    layers = {
        "conv1": nn.Conv2d(3, 64, 5, padding=2), "pool1": max_pool(), "act1": activation(act),
        **({"norm1": normalisation()} if lrn else {}),
        "conv2": nn.Conv2d(64, 64, 5, padding=2), **second,
        "local3": LocallyConnected(64, filters, quarter), "act3": activation(act),
        "local4": LocallyConnected(filters, 32, quarter), "act4": activation(act),
        "flatten": nn.Flatten(), "fc10": nn.Linear(32 * quarter**2, classes),
    }
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
        if name in STD and init == "file":
            nn.init.normal_(layer.weight, 0.0, STD[name])
            nn.init.zeros_(layer.bias)
        elif name in STD:
            layer.reset_parameters()
    return net


def max_pool() -> nn.Module:
    return nn.MaxPool2d(3, 2, ceil_mode=True)


def normalisation() -> nn.Module:
    """cuda-convnet's cmrnorm of these nets: x / (1 + 0.001 / 9 * the sum of squares over 9 maps) ** 0.75."""
    return LocalResponseNorm(size=9, alpha=0.001, beta=0.75, k=1.0)


def make_optimizer(net: nn.Sequential, decay: float, lr: float = RATE) -> torch.optim.SGD:
    """cuda-convnet's update, v = 0.9 v - lr decay w - lr g; w = w + v. `decay` is fc10's, that of the local layers is
    LOCAL_DECAY where `decay` is not 0; convolutions and biases have none. Biases have twice the learning rate."""
    decays = {"fc10": decay, "local3": LOCAL_DECAY, "local4": LOCAL_DECAY} if decay else {}
    groups = [
        {"params": [net.get_submodule(name).weight], "scale": 1, "weight_decay": decays.get(name, 0.0)} for name in STD
    ]
    groups.append({
        "params": [net.get_submodule(name).bias for name in STD], "scale": BIASES, "weight_decay": 0.0
    })
    for group in groups:
        group["lr"] = lr * group["scale"]
    return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, fused=True)


def lower_rate(optimizer, lr: float) -> None:
    """Set the weights' learning rate, from one epoch to the next; the biases keep theirs."""
    biases = optimizer.param_groups[-1]
    biases["scale"] = biases["lr"] / lr
    set_rate(optimizer, lr)


# ---------------------------------------------------------------------------------------------- the pictures


class Pictures:
    """CIFAR-10 as it is, 32 x 32, in the order of training, five equal parts of the training pictures one after the
    other. side: that of the crops, out of which mirrored ones are half; 32 are whole pictures, none of them mirrored.
    scale: what pixels are multiplied by in training, when the mean has been subtracted.
    """

    def __init__(self, store: Store, side: int, device: torch.device, scale: float = 1.0):
        self.scale = scale
        self.side, self.classes, self.fingerprint = side, len(store.classes), store.fingerprint
        self.train, rest, self.test = (Loader(store, s, device, resident=True) for s in ("train", "val", "test"))
        self.train.images = torch.cat([self.train.images, rest.images])
        self.train.labels = torch.cat([self.train.labels, rest.labels])
        count = len(self.train.labels)
        order = np.random.Generator(np.random.Philox(2012)).permutation(count)
        self.parts = np.array_split(order, 5)
        mean = self.train.images.sum(0, dtype=torch.int64) / count
        self.augment = Augment(side, mean, device=device)

    def plan(self, parts: int) -> list[np.ndarray]:
        """The batches of an epoch over so many parts; each part ends with a smaller one (cuda-convnet)."""
        return [part[s : s + BATCH] for part in self.parts[:parts] for s in range(0, len(part), BATCH)]

    def batches(self, plan: list[np.ndarray], seed: int, epoch: int):
        """The crops and labels of a plan, as a net takes them."""
        margin = STORED - self.side
        tables = epoch_tables(seed, epoch, len(self.train.labels), margin, mirrored=margin > 0)
        for crops, labels in self.train.batches(plan, tables, self.side):
            yield self.scale * self.augment.center(crops), labels

    def held_out(self):
        """The last part, whole."""
        return self.train.batches(np.array_split(self.parts[4], max(1, len(self.parts[4]) // BATCH)))

    def views(self, protocol: str):
        """utils.evaluate's views of whole pictures (n, 32, 32, 3)."""
        return {
            "centre": self.augment.views, "ten": lambda images: self.augment.views(images, ten_crop=True),
            "nine": self.nine_views,
        }[protocol]

    def nine_views(self, images: Tensor):
        """3 x 3 places, not mirrored (the authors' later convdata_cifar.py)."""
        margin = STORED - self.side
        for top, left in itertools.product((0, margin // 2, margin), repeat=2):
            yield self.augment.center(images[:, top : top + self.side, left : left + self.side])


# ---------------------------------------------------------------------------------------------- the loop


def train_epoch(net, optimizer, pictures: Pictures, parts: int, seed: int, epoch: int, watch: Watch, precision="fp32"):
    """Train an epoch, counted from 0, on so many parts. Returns its mean loss, its error in percent, that of each part
    and its speed, or None where a signal came. Raises Diverged."""
    plan = pictures.plan(parts)
    sizes = [len(part) for part in pictures.parts[:parts]]
    part_of = [number for number, size in enumerate(sizes) for _ in range(0, size, BATCH)]
    total, began = sum(sizes), time.monotonic()
    loss_sum = torch.zeros((), dtype=torch.float64, device=pictures.train.device)
    wrong = torch.zeros(parts, dtype=torch.float64, device=pictures.train.device)
    net.train()
    with Progress(f"epoch {epoch + 1}", total) as progress:
        for step, (inputs, labels) in enumerate(pictures.batches(plan, seed, epoch)):
            loss, logits = train_step(net, optimizer, inputs, labels, precision)
            loss_sum += loss * len(labels)
            wrong[part_of[step]] += (logits.argmax(1) != labels).sum()
            if (step % LOOK_EVERY == 0 or step == len(plan) - 1) and not loss_sum.isfinite():
                raise Diverged(f"the loss is no longer finite in epoch {epoch + 1}")
            progress.update(len(labels))
            if watch.received:
                return None
    seconds = time.monotonic() - began
    return {
        "train_loss": loss_sum.item() / total, "train_top1_error": 100 * wrong.sum().item() / total,
        "part_errors": [100 * count / size for count, size in zip(wrong.tolist(), sizes, strict=True)],
        "images_per_second": total / seconds, "seconds": seconds,
    }


def save(path: Path, net: nn.Module, optimizer, pictures: Pictures, epoch: int, **more) -> None:
    """Keep what goes on after `epoch` epochs. Raises Diverged."""
    if not all(parameter.isfinite().all() for parameter in net.parameters()):
        raise Diverged(f"the weights are no longer finite after epoch {epoch}")
    checkpoints.save_checkpoint(path, {
        "model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch,
        "fingerprint": pictures.fingerprint, **more,
    })


def load(path: Path, net: nn.Module, optimizer, pictures: Pictures) -> dict:
    """Take up the state of a file of save()'s, and return it; {"epoch": 0} where there is no such file."""
    if not path.exists():
        return {"epoch": 0}
    anew = f"remove {shown(path.parent)} to train this net anew"
    try:
        checkpoints.check_archive(path)
        last = torch.load(path, map_location=next(net.parameters()).device, weights_only=True)
        net.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        epoch, fingerprint = int(last["epoch"]), last["fingerprint"]
    except Exception as reason:  # torch's reader raises nearly anything
        if isinstance(reason, OSError) or lacks_memory(reason):
            raise
        raise UserError(f"{shown(path)} is damaged or of another net ({utils.one_line(reason)}); {anew}") from None
    if fingerprint != pictures.fingerprint:
        raise UserError(f"{shown(path)} was trained on another store of CIFAR-10; {anew}")
    return last | {"epoch": epoch}


def error(net: nn.Module, views, batches) -> float:
    """Top-1 error in percent over batches of whole pictures and labels, in float32."""
    net.eval()
    wrong, count = 0, 0
    for images, labels in batches:
        wrong += utils.error_counts(utils.probabilities([(net, views)], images), labels)[0].item()
        count += len(labels)
    return 100 * wrong / count
