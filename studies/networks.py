"""The nets of the FReLU study (Qiu, Xu and Cai 2017) for RGB pictures of 32 x 32, each with any of model.py's
activations:

    smallnet, smallnet-bn        three convolutions and two dense layers, without and with batch norm
    nin                          Network in Network (Lin, Chen and Yan 2014) with batch norm
    resnet20, 32, 44, 56, 110    residual nets (He et al. 2016, section 4.2), an activation after each addition
    resnet20-no-act-after-add    and so on: the same without those (Shah et al. 2016), with one before the average pool
    two-units                    the net of studies.embedding

Layers, sizes and initialisation follow the authors' own code (kyuusaku/frelu.torch). It leaves the convolutions of
smallnet without biases, too, where no batch norm follows: b is their only offset there.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from model import activation

SIDE = 32  # pixels
DEPTHS = (20, 32, 44, 56, 110)
FORMS = ("", "-no-act-after-add")
NETWORKS = ("smallnet", "smallnet-bn", "nin", *(f"resnet{depth}{form}" for form in FORMS for depth in DEPTHS))


def build(network: str, num_classes: int = 10, act: str = "relu") -> nn.Module:
    """One of NETWORKS, or "two-units", freshly initialised from torch's generator; its `config` names it. Raises
    ValueError for other names."""
    if network not in (*NETWORKS, "two-units"):
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, not {network!r}")
    if network == "two-units":
        net = TwoUnits(num_classes, act)
    elif network.startswith("smallnet"):
        net = SmallNet(num_classes, act, batch_norm=network.endswith("bn"))
    elif network == "nin":
        net = NIN(num_classes, act)
    else:
        depth, _, form = network.removeprefix("resnet").partition("-")
        net = ResNet(int(depth), num_classes, act, after_addition=not form)
    net.config = {"network": network, "num_classes": num_classes, "image_size": SIDE, "activation": act}
    return net


def init_weights(net: nn.Module) -> None:
    """Convolutions normal, std sqrt(2 / (outputs x window)) (He et al. 2015, by what goes out); biases 0; dense
    weights stay torch's own, uniform within 1 / sqrt(inputs)."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2 / (layer.out_channels * layer.kernel_size[0] ** 2)))
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


class SmallNet(nn.Sequential):
    """(n, 3, 32, 32) to (n, num_classes): 3 x 3 convolutions of 32, 64 and 128 kernels, each with an activation, a pool
    and dropout of 0.2; a dense layer of 512 with dropout of 0.5; the logits."""

    def __init__(self, num_classes: int = 10, act: str = "relu", batch_norm: bool = False):
        super().__init__()
        channels = (3, 32, 64, 128)
        for i in (1, 2, 3):
            self.add_module(f"conv{i}", nn.Conv2d(channels[i - 1], channels[i], 3, padding=1, bias=False))
            self.add_module(f"norm{i}", nn.BatchNorm2d(channels[i]) if batch_norm else nn.Identity())
            self.add_module(f"act{i}", activation(act))
            self.add_module(f"pool{i}", nn.MaxPool2d(2))
            self.add_module(f"drop{i}", nn.Dropout(0.2))
        self.flatten = nn.Flatten()
        self.fc4 = nn.Linear(128 * 4 * 4, 512)
        self.norm4 = nn.BatchNorm1d(512) if batch_norm else nn.Identity()
        self.act4 = activation(act)
        self.drop4 = nn.Dropout(0.5)
        self.fc5 = nn.Linear(512, num_classes)
        init_weights(self)


class NIN(nn.Sequential):
    """(n, 3, 32, 32) to (n, num_classes): three blocks of a convolution and two more of 1 x 1, then the average of each
    map. batch_norm=False is the net as Lin, Chen and Yan published it: biases instead of norms, and an average in the
    second pool."""

    def __init__(self, num_classes: int = 10, act: str = "relu", batch_norm: bool = True):
        super().__init__()
        second = nn.MaxPool2d if batch_norm else nn.AvgPool2d
        # Inputs and outputs of a layer, its window; what follows the block.
        blocks = (
            ([(3, 192, 5), (192, 160, 1), (160, 96, 1)], (nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout(0.5))),
            ([(96, 192, 5), (192, 192, 1), (192, 192, 1)], (second(3, 2, ceil_mode=True), nn.Dropout(0.5))),
            ([(192, 192, 3), (192, 192, 1), (192, num_classes, 1)], (nn.AvgPool2d(8), nn.Flatten())),
        )
        number = 0
        for i, (layers, rest) in enumerate(blocks, 1):
            for inputs, outputs, window in layers:
                number += 1
                conv = nn.Conv2d(inputs, outputs, window, padding=window // 2, bias=not batch_norm)
                self.add_module(f"conv{number}", conv)
                self.add_module(f"norm{number}", nn.BatchNorm2d(outputs) if batch_norm else nn.Identity())
                self.add_module(f"act{number}", activation(act))
            for layer in rest:
                self.add_module(f"{type(layer).__name__.lower()}{i}", layer)
        init_weights(self)


class ResNet(nn.Module):
    """(n, 3, 32, 32) to (n, num_classes): a convolution, three stages of (depth - 2) / 6 blocks with 16, 32 and 64
    maps of 32, 16 and 8 pixels, the average of each map, a dense layer. after_addition: an activation there, in each
    block; otherwise there is one before the average alone, and no batch norm after the first convolution."""

    def __init__(self, depth: int, num_classes: int = 10, act: str = "relu", after_addition: bool = True):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2, such as {', '.join(map(str, DEPTHS))}, not {depth!r}")
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16) if after_addition else nn.Identity()
        self.act = activation(act)
        widths = [w for w in (16, 32, 64) for _ in range((depth - 2) // 6)]
        pairs = zip([16, *widths], widths, strict=False)
        self.blocks = nn.Sequential(*(Block(a, b, act, after_addition) for a, b in pairs))
        self.last_act = nn.Identity() if after_addition else activation(act)
        self.fc = nn.Linear(64, num_classes)
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.act(self.norm(self.conv(images))))
        return self.fc(self.last_act(x).mean((2, 3)))


class Block(nn.Module):
    """Two convolutions and the input added to them. Where the maps get twice as many they get half as wide: the
    shortcut then takes every second pixel, and zeros for the new maps (He et al.'s option A)."""

    def __init__(self, inputs: int, outputs: int, act: str, after_addition: bool):
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.act1 = activation(act)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.act2 = activation(act) if after_addition else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return self.act2(y + x)


class TwoUnits(nn.Module):
    """The net of the study's embedding: (n, 3, 32, 32) to (n, num_classes) by way of two units that can be drawn.
    Three blocks of two 5 x 5 convolutions with 32, 64 and 128 kernels, ReLUs and a pool; act follows the two units."""

    def __init__(self, num_classes: int = 10, act: str = "relu"):
        super().__init__()
        layers = []
        for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(inputs, outputs, 5, padding=2), nn.ReLU(inplace=True)]
            layers += [nn.Conv2d(outputs, outputs, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.blocks = nn.Sequential(*layers)
        self.units = nn.Linear(128 * 4 * 4, 2)
        self.act = activation(act)
        self.fc = nn.Linear(2, num_classes)
        init_weights(self)

    def embed(self, images: Tensor) -> Tensor:
        """The two units after their activation, (n, 2)."""
        return self.act(self.units(self.blocks(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.embed(images))
