"""AlexNet, as in Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks"
(NIPS 2012): layers, local response normalisation (LRN), dropout, activations and initialisation. One file, torch only;
copied alone, it works.

The net for 224 x 224 pictures and 1000 classes, one column (the paper's figure 2 with both halves joined):

    layer   what it does                          output          parameters
    images  RGB, 0..255 minus the mean            3 x 224 x 224
    conv1   96 kernels 11x11, stride 4, pad 2     96 x 55 x 55        34,944
    norm1   LRN after the ReLU                    96 x 55 x 55
    pool1   max 3x3, stride 2                     96 x 27 x 27
    conv2   256 kernels 5x5, pad 2                256 x 27 x 27      614,656
    norm2   LRN after the ReLU                    256 x 27 x 27
    pool2   max 3x3, stride 2                     256 x 13 x 13
    conv3   384 kernels 3x3, pad 1                384 x 13 x 13      885,120
    conv4   384 kernels 3x3, pad 1                384 x 13 x 13    1,327,488
    conv5   256 kernels 3x3, pad 1                256 x 13 x 13      884,992
    pool3   max 3x3, stride 2                     256 x 6 x 6
    fc6     dense, then ReLU and dropout          4096            37,752,832
    fc7     dense, then ReLU and dropout          4096            16,781,312
    fc8     dense, no ReLU: the logits            1000             4,097,000
                                                  in all          62,378,344

Three known nets: AlexNet() is this table; AlexNet(columns=2) is the paper's two-GPU net as one module;
AlexNet(columns=2, order="2012") is the net of the authors' source.

Sources named below: *paper* is the text; *2012 code* is the authors' own source (Computer History Museum, 2025), its
net being layers-145.cfg. REPRODUCTION.md goes through the differences one by one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ORDERS = ("paper", "2012")
RECIPES = ("2012", "paper")

# LRN's four numbers (paper, section 3.3). The paper prints alpha alone; its authors' code divides it by n.
LRN_SIZE, LRN_ALPHA, LRN_BETA, LRN_K = 5, 1e-4, 0.75, 2.0
LRN_ALPHAS = ("2012", "paper")

# The smallest inputs that leave a pixel after the last pool.
SMALLEST = {"paper": 63, "2012": 64}


class AlexNet(nn.Module):
    """AlexNet for square RGB pictures.

    num_classes: number of logits.
    image_size: side of the input in pixels, at least 63 (order "2012": 64). 227 is taken without padding in conv1
        (Caffe's size, the same maps); in the paper's order every other size is padded by 2: 224 gives 55 x 55.
    columns: 1, or 2 for the paper's two GPUs as one module: conv2, conv4 and conv5 and both LRNs then see their own
        half of the channels only (paper, figure 2).
    order: "paper" (ReLU, LRN, pooling), or "2012" for the order of the authors' source: conv1's output is normalised
        and pooled before its ReLU, a second norm within each map follows LRN 2, conv5's ReLU follows the pool, and
        conv1 pads zeros on the right and at the bottom only, as many as its last window needs (3 at 224).
    activation: "relu", "tanh" (paper, figure 1), "elu", "prelu", "srelu" or "frelu", see activation().
    lrn, overlapping_pool, dropout: the paper's sections 3.3, 3.4 and 4.2; False (no norm at all), False (2x2 windows
        instead of 3x3: the same map sizes from odd sides, as at 224 and 64, one pixel more from even ones) and 0 leave
        them out.
    lrn_alpha: "2012" divides alpha by the number of channels summed, "paper" takes it as it is printed.
    lrn_k: 2 (paper); Caffe's default is 1.
    lrn_across: with two columns, let LRN's window cross from one into the other, as Caffe's does.

    Raises ValueError where a number or a word is not one of these; flags are not checked.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        image_size: int = 224,
        columns: int = 1,
        order: str = "paper",
        activation: str = "relu",
        lrn: bool = True,
        overlapping_pool: bool = True,
        dropout: float = 0.5,
        lrn_alpha: str = "2012",
        lrn_k: float = LRN_K,
        lrn_across: bool = False,
    ):
        super().__init__()
        # What rebuilds this net: checkpoints keep it with the weights.
        self.config = {
            "num_classes": num_classes, "image_size": image_size, "columns": columns, "order": order,
            "activation": activation, "lrn": lrn, "overlapping_pool": overlapping_pool, "dropout": dropout,
            "lrn_alpha": lrn_alpha, "lrn_k": lrn_k, "lrn_across": lrn_across,
        }
        _check_options(**self.config)
        act = ACTIVATIONS[activation]
        window = 3 if overlapping_pool else 2
        if order == "2012":
            padding, beyond = 0, -(image_size - 11) % 4  # conv1's windows are rounded up: 55 at 224
        else:
            padding, beyond = 0 if image_size == 227 else 2, 0

        def norm():
            alpha = LRN_ALPHA if lrn_alpha == "2012" else LRN_ALPHA * LRN_SIZE  # undoes the division
            return LocalResponseNorm(1 if lrn_across else columns, alpha=alpha, k=lrn_k) if lrn else nn.Identity()

        if order == "2012":
            self.pad1 = nn.ZeroPad2d((0, beyond, 0, beyond))
        self.conv1 = nn.Conv2d(3, 96, kernel_size=11, stride=4, padding=padding)
        self.act1 = act()
        self.norm1 = norm()
        self.pool1 = nn.MaxPool2d(window, stride=2)
        self.conv2 = nn.Conv2d(96, 256, kernel_size=5, padding=2, groups=columns)
        self.act2 = act()
        self.norm2 = norm()
        if order == "2012":
            self.mapnorm2 = MapNorm() if lrn else nn.Identity()
        self.pool2 = nn.MaxPool2d(window, stride=2)
        self.conv3 = nn.Conv2d(256, 384, kernel_size=3, padding=1)  # sees both columns
        self.act3 = act()
        self.conv4 = nn.Conv2d(384, 384, kernel_size=3, padding=1, groups=columns)
        self.act4 = act()
        self.conv5 = nn.Conv2d(384, 256, kernel_size=3, padding=1, groups=columns)
        self.act5 = act()
        self.pool3 = nn.MaxPool2d(window, stride=2)

        side = (image_size + 2 * padding + beyond - 11) // 4 + 1  # conv1: 55 at 224, 15 at 64
        for _ in range(3):
            side = (side - window) // 2 + 1  # pools: 27, 13, 6 at 224; 7, 3, 1 at 64
        self.fc6 = nn.Linear(256 * side * side, 4096)
        self.act6 = act()
        self.drop6 = Dropout(dropout)
        self.fc7 = nn.Linear(4096, 4096)
        self.act7 = act()
        self.drop7 = Dropout(dropout)
        self.fc8 = nn.Linear(4096, num_classes)
        self.init_weights()

    def init_weights(self, recipe: str = "2012") -> None:
        """Draw all weights and biases anew from torch's global generator; recipe is "2012" or "paper"."""
        _check("recipe", recipe, recipe in RECIPES, " or ".join(RECIPES))
        for name, layer in self.named_children():
            if isinstance(layer, FReLU | nn.PReLU):
                layer.reset_parameters()  # back to -1, or 0.25
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                continue
            std = 0.01  # every layer: paper, section 5
            if recipe == "2012" and name in ("conv3", "conv4", "conv5"):
                std = 0.03  # initW of layers-145.cfg (2012 code)
            nn.init.normal_(layer.weight, 0.0, std)
            # Ones feed the ReLUs positive inputs from the start; conv1, conv3 and fc8 start at 0 (paper, section 5).
            nn.init.constant_(layer.bias, 1.0 if name in ("conv2", "conv4", "conv5", "fc6", "fc7") else 0.0)

    def features(self, images: Tensor) -> Tensor:
        """fc7's outputs after activation and dropout (in eval mode times 1 - dropout), (N, 4096), for images as in
        forward."""
        size = self.config["image_size"]
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size) or not images.is_floating_point():
            got = f"{tuple(images.shape)} {images.dtype}"
            raise ValueError(f"this net takes float images of shape (N, 3, {size}, {size}), not {got}")
        # Shapes in brackets are those of 224 x 224 pictures.
        if self.config["order"] == "paper":
            x = self.act1(self.conv1(images))  # (N, 96, 55, 55)
            x = self.pool1(self.norm1(x))  # (N, 96, 27, 27)
            x = self.act2(self.conv2(x))  # (N, 256, 27, 27)
            x = self.pool2(self.norm2(x))  # (N, 256, 13, 13)
            x = self.act3(self.conv3(x))  # (N, 384, 13, 13)
            x = self.act4(self.conv4(x))  # (N, 384, 13, 13)
            x = self.act5(self.conv5(x))  # (N, 256, 13, 13)
            x = self.pool3(x)  # (N, 256, 6, 6)
        else:
            x = self.conv1(self.pad1(images))  # (N, 96, 55, 55)
            x = self.act1(self.pool1(self.norm1(x)))  # (N, 96, 27, 27)
            x = self.act2(self.conv2(x))  # (N, 256, 27, 27)
            x = self.pool2(self.mapnorm2(self.norm2(x)))  # (N, 256, 13, 13)
            x = self.act3(self.conv3(x))  # (N, 384, 13, 13)
            x = self.act4(self.conv4(x))  # (N, 384, 13, 13)
            x = self.conv5(x)  # (N, 256, 13, 13)
            x = self.act5(self.pool3(x))  # (N, 256, 6, 6)
        x = x.flatten(1)  # (N, 9216), channel by channel
        x = self.drop6(self.act6(self.fc6(x)))  # (N, 4096)
        return self.drop7(self.act7(self.fc7(x)))  # (N, 4096)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (N, num_classes), of float images (N, 3, S, S) on the 0..255 scale with the mean subtracted."""
        return self.fc8(self.features(images))


class LocalResponseNorm(nn.Module):
    """The paper's LRN (section 3.3) over the channels of (N, C, H, W), for positive and negative inputs alike:

        b[c] = a[c] / (k + alpha / n * (sum of a[j] ** 2 over the n channels j around c)) ** beta

    The sum stops at the first and last channel of a column. The division of alpha by n is the 2012 code's; Caffe and
    torch.nn.LocalResponseNorm do the same. Works in float32 or better; the output has the input's dtype.
    """

    def __init__(self, columns=1, size=LRN_SIZE, alpha=LRN_ALPHA, beta=LRN_BETA, k=LRN_K):
        super().__init__()
        _check("size", size, size % 2 == 1, "odd")
        self.columns, self.size, self.alpha, self.beta, self.k = columns, size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        columns = wide(x).unflatten(1, (self.columns, -1)).unbind(1)
        return torch.cat([self._normalise(a) for a in columns], 1).to(x.dtype)

    def _normalise(self, a: Tensor) -> Tensor:
        """One column, (N, C, H, W)."""
        channels, around = a.shape[1], self.size // 2
        squares = F.pad(a * a, (0, 0, 0, 0, around, around))  # zeros before the first channel and after the last
        total = sum(squares[:, shift : shift + channels] for shift in range(self.size))
        return a / (self.k + self.alpha / self.size * total) ** self.beta

    def extra_repr(self) -> str:
        return f"columns={self.columns}, size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class MapNorm(nn.Module):
    """The 2012 code's norm within each map of (N, C, H, W), which the paper leaves out (layers-145.cfg, after LRN 2):

        b = a / (1 + 0.001 / 25 * (sum of a ** 2 over the 5 x 5 window around it in its map)) ** 0.75

    Beyond the map's edge there are zeros. Works in float32 or better; the output has the input's dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        a = wide(x)
        mean_square = F.avg_pool2d(a * a, 5, stride=1, padding=2, count_include_pad=True)
        return (a * (1 + 0.001 * mean_square) ** -0.75).to(x.dtype)


class Dropout(nn.Module):
    """The paper's dropout (section 4.2): training multiplies by a mask of zeros and ones and does not rescale,
    testing multiplies by 1 - p. torch.nn.Dropout instead divides by 1 - p in training. Masks come from torch's
    global generator."""

    def __init__(self, p: float = 0.5):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0:
            return x
        return x * self.mask(x) if self.training else x * (1 - self.p)

    def mask(self, x: Tensor) -> Tensor:
        """For each number of x whether it is kept: with probability 1 - p."""
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class FReLU(nn.Module):
    """Flexible ReLU (Qiu, Xu and Cai 2017, arXiv 1706.08098): max(x, 0) + b for float x of any shape. b is one
    learnable number, -1 at the start. Works in float32 or better; the output has the input's dtype."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.bias, -1.0)

    def forward(self, x: Tensor) -> Tensor:
        return (F.relu(wide(x)) + self.bias).to(x.dtype)


class SReLU(FReLU):
    """Shifted ReLU, as in the same authors' code: max(x, b). Otherwise like FReLU."""

    def forward(self, x: Tensor) -> Tensor:
        a = wide(x)
        return torch.where(a <= self.bias, self.bias, a).to(x.dtype)  # at x = b all of the gradient is b's


ACTIVATIONS = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "prelu": nn.PReLU, "srelu": SReLU, "frelu": FReLU
}


def activation(name: str) -> nn.Module:
    """A new activation: "relu", "tanh", "elu" (alpha 1), "prelu" (one slope a layer, from 0.25), "srelu" or "frelu".
    Raises ValueError for other names."""
    _check("activation", name, name in list(ACTIVATIONS), " or ".join(ACTIVATIONS))
    return ACTIVATIONS[name]()


def activation_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """The one learnable value of each FReLU, SReLU and PReLU in a net, by the module's name. They get no weight decay:
    it would pull them to 0, where all three are ReLUs (He et al. 2015, section 2.1, on PReLU)."""
    layers = {name: m for name, m in net.named_modules() if isinstance(m, FReLU | nn.PReLU)}
    return {name: m.weight if isinstance(m, nn.PReLU) else m.bias for name, m in layers.items()}


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_options(num_classes, image_size, columns, order, activation, dropout, lrn_alpha, lrn_k, **_flags) -> None:
    _check("num_classes", num_classes, isinstance(num_classes, int) and num_classes >= 1, "a whole number from 1")
    _check("order", order, order in ORDERS, " or ".join(ORDERS))
    least = SMALLEST[order]
    _check("image_size", image_size, isinstance(image_size, int) and image_size >= least, f"{least} pixels or more")
    _check("columns", columns, isinstance(columns, int) and columns in (1, 2), "1 or 2")
    _check("activation", activation, activation in list(ACTIVATIONS), " or ".join(ACTIVATIONS))
    _check("dropout", dropout, isinstance(dropout, int | float) and 0 <= dropout < 1, "at least 0 and below 1")
    _check("lrn_alpha", lrn_alpha, lrn_alpha in LRN_ALPHAS, " or ".join(LRN_ALPHAS))
    _check("lrn_k", lrn_k, isinstance(lrn_k, int | float) and 0 < lrn_k < 1e30, "a number above 0")


def _check(name: str, value, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, not {value!r}")
