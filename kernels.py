"""Faster versions of model.py's formulas, and accelerate(net), which swaps them in:

    LRN             on a CPU kernels.c, compiled when it is first needed (half a second for each size of window), for
                    float32 and bfloat16; on a GPU Triton, for these and float16; for windows wider than 15 channels,
                    powers other than 0.75 and elsewhere torch's operations, with the derivative written out and, on a
                    CPU, in pieces that stay in the cache
    dense layers    on a CPU oneDNN's product instead of MKL's, which leaves half of an AMD processor with AVX-512
                    unused (without it both are as fast); float32
    convolutions    on a CPU in bfloat16, where their maps have at most 3 x 3 positions (conv3 to conv5 at 64 pixels):
                    the weights' gradient by a product of two matrices
    dropout         on a CPU masks of random bits, in a twentieth of bernoulli_'s time
    FReLU, SReLU    the derivative written out: like a ReLU, they keep their output alone
    ReLU, ELU       in place, in an AlexNet: no other layer of it needs what they overwrite

Each is compared with its formula when it is first used, output and gradients, and left out where they differ (those in
torch's own operations, FReLU, SReLU and LRN without a kernel, in float32 on the CPU, whatever the device); masks can't
be, and torch has its own tests for working in place. Parameters and their names stay, so a net has the same
checkpoints with and without. What a fast version can't take (other devices, dtypes, layouts, wider windows) goes to a
slower one.

The Triton kernels have run on an H100 with windows of 5, where they agree with the formula to 1e-7 in float32 and 2e-3
in bfloat16; with others in Triton's interpreter alone.
"""

import ctypes
import functools
import itertools
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from model import LRN_BETA, LRN_SIZE, AlexNet, Dropout, FReLU, LocalResponseNorm, SReLU, wide
from utils import one_line

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's builds for a CPU come without
    triton = None

SOURCE = Path(__file__).with_name("kernels.c")
# How far a fast version may be from its formula in float32, of the largest number.
SAME = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# The most channels and the widest window that kernels.c takes: what it works on lies on the stack of its thread.
CHANNELS, WIDEST = 1024, 15
# What one Triton program works on, with so many warps: four numbers a thread. With 16 the backward pass takes up to 255
# registers a thread on an H100 and spills to memory; with four at most 96, so that 20 warps have room side by side (for
# windows of 5; of 9 up to 146, of 15 up to 233, without spilling).
TILE_PIXELS, TILE_CHANNELS, WARPS = 16, 32, 4

# The most positions of a map for which FastConv2d computes the weights' gradient. For conv3 to conv5, a batch of 128
# and two threads oneDNN takes 41 ms with AMX and 53 without at 3 x 3 positions, FastConv2d 8 and 40; at 4 x 4 positions
# oneDNN takes 44 and 64 ms, FastConv2d 13 and 70.
POSITIONS = 9

# LRN in torch's operations takes this many numbers at a time on a CPU. Its temporary tensors have to be smaller than
# 2 MB: from there on torch aligns them for large pages, and unless glibc keeps what is freed (memory.keep does
# both), each takes its memory from Linux anew. At (64, 96, 55, 55), forward + backward on one thread, 300,000 cause
# 16,000 page faults and 80 ms in Linux, 600,000 cause 215,000 and 640 ms.
CPU_PIECE = 300_000


def accelerate(net: nn.Module) -> str:
    """Swap in the fast versions for the device that a net is on: layers change their class and keep all else. Those
    with hooks, and of classes derived from model.py's and torch's, are left alone. Returns a line that says how LRN and
    the dense layers are computed, and why. The fast versions can be differentiated once, backwards."""
    device = next((p.device for p in net.parameters()), torch.device("cpu")).type
    layers = list(net.modules())
    sizes = {layer.size for layer in layers if type(layer) in LRNS and not hooked(layer)}
    versions = fast_versions(device, sizes)
    for layer in layers:
        if type(layer) in versions and not hooked(layer):
            layer.__class__ = versions[type(layer)]
        if type(layer) is AlexNet and not any(map(hooked, layer.modules())):
            for act in layer.children():
                if type(act) in (nn.ReLU, nn.ELU):
                    act.inplace = True
    line = []
    if any(isinstance(layer, LocalResponseNorm) for layer in layers):
        trouble = trouble_with_lrn(device, sizes)
        line.append(f"LRN in torch's operations ({trouble})" if trouble else f"LRN {FAST_LRN[device].words}")
    if any(isinstance(layer, nn.Linear) for layer in layers):
        trouble = trouble_with_dense(device)
        line.append(f"dense layers of torch ({trouble})" if trouble else "dense layers by oneDNN in fp32")
    return ", ".join(line or ["nothing to accelerate"])


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has bf16 arithmetic of its own; others emulate it, slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:  # no Linux
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def fast_versions(device: str, sizes: Iterable[int] = ()) -> dict[type, type]:
    """The classes that can be swapped for faster ones on a device, for a net with LRN's windows of those sizes. LRN's
    fast ones are among them, for a net that has moved since."""
    lrn = TorchLRN if trouble_with_lrn(device, sizes) else FAST_LRN[device]
    versions, checked = dict.fromkeys(LRNS, lrn) | {FReLU: FastFReLU, SReLU: FastSReLU}, FAST_LRN.values()
    versions = {plain: fast for plain, fast in versions.items() if fast in checked or not difference(fast)}
    versions |= {Dropout: FastDropout} | ({} if trouble_with_dense(device) else {nn.Linear: FastLinear})
    convolve = device == "cpu" and multiplies_bf16(torch.device(device)) and not difference(FastConv2d)
    return versions | ({nn.Conv2d: FastConv2d} if convolve else {})


def hooked(layer: nn.Module) -> bool:
    """Whether a layer has hooks; pruning and weight norm are hooks, too."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(map(len, hooks))


@functools.cache
@torch.inference_mode(False)
@torch.enable_grad()
def difference(fast: type[nn.Module], **more) -> str:
    """What is wrong with a fast version, for a message: "is wrong" where its output or gradients are off by more than
    SAME, "fails" and how; "" if nothing is. In each of its dtypes and both layouts, against the formula in float32;
    `more` are options of the layer. Leaves the random generators as they were."""
    plain, options, shape = EXAMPLES[fast]
    options = options | more
    layouts = (torch.contiguous_format, torch.channels_last)[: 2 if len(shape) == 4 else 1]
    device = getattr(fast, "device", "cpu")

    def wave(like: Tensor) -> Tensor:
        return (100 * torch.arange(1.0, like.numel() + 1, device=device).sin()).view(like.shape)

    try:
        for dtype, layout in itertools.product(getattr(fast, "dtypes", (torch.float32,)), layouts):
            found = []
            for kind, precision in ((fast, dtype), (plain, torch.float32)):
                with torch.random.fork_rng(devices=[]):
                    layer = kind(**options).to(device)
                for parameter in layer.parameters():
                    parameter.data = wave(parameter).to(dtype).to(precision)
                x = wave(torch.empty(shape)).to(dtype).to(precision).contiguous(memory_format=layout).requires_grad_()
                y = layer(x)
                g = wave(y).cos().to(dtype).to(precision)
                found.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], g)])
            for got, right in zip(*found, strict=True):
                if not (got - right).abs().max() <= SAME[dtype] * right.abs().max():
                    return "is wrong" if dtype == torch.float32 else f"is wrong in {dtype}".replace("torch.", "")
    except Exception as error:  # Triton's compiler, and operators of torch's that it does not document, raise anything
        return f"fails ({type(error).__name__}: {one_line(error)[:100]})"
    return ""


# ---------------------------------------------------------------------------------------------- dropout, activations


class FastDropout(Dropout):
    """model.Dropout with masks of random bits on a CPU."""

    def mask(self, x: Tensor) -> Tensor:
        if self.p != 0.5 or x.device.type != "cpu":
            return super().mask(x)
        # One bit of a random byte is a fair coin. random_() breaks torch.compile's graph; whole, with masks of its own,
        # a step takes longer (results/SPEED.md).
        words = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_()
        return (words.view(torch.uint8)[: x.numel()] & 1).view(torch.bool).view(x.shape)


class FastFReLU(FReLU):
    """model.FReLU; b is rounded to x's dtype, as weights are under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.compiler.is_compiling() else _Rectify.apply(x, self.bias, True)


class FastSReLU(SReLU):
    """model.SReLU, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.compiler.is_compiling() else _Rectify.apply(x, self.bias, False)


class _Rectify(torch.autograd.Function):
    """FReLU (flexible) or SReLU, for the gradient g that arrives:

        grad x = g where the output is above b, else 0;   grad b = the sum of g, for SReLU where the output is b

    Like a ReLU this keeps its output alone, which the next layer mostly keeps anyway. So FReLU's output has to be above
    b wherever x is above 0: a smaller x is raised to `step`, or x + b could be rounded to b.
    """

    @staticmethod
    def forward(ctx, x, b, flexible):
        ctx.b, ctx.flexible = b.detach().to(x.dtype, copy=True), flexible
        if flexible:
            step = ctx.b.abs() * torch.finfo(x.dtype).eps
            y = x.sign().clamp_min_(0).mul_(step)
            torch.maximum(x, y, out=y).add_(ctx.b)
        else:
            y = x.maximum(ctx.b)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        passing = torch.ops.aten.threshold_backward(g, y - ctx.b, 0)
        left = g if ctx.flexible else g - passing
        return passing, left.sum(dtype=torch.promote_types(g.dtype, torch.float32)), None


# ---------------------------------------------------------------------------------------------- dense layers


class FastLinear(nn.Linear):
    """nn.Linear, by oneDNN where it can: float32 on a CPU, without autocast."""

    def __setstate__(self, state) -> None:
        super().__setstate__(state)  # copied, or pickled on another machine
        if trouble_with_dense("cpu"):
            self.__class__ = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        fast = (
            x.device.type == "cpu" and x.ndim == 2 and x.numel() and self.weight.numel() and self.bias is not None
            and x.shape[1] == self.weight.shape[1]  # otherwise torch says what does not fit
            and x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        )
        return dense(x, self.weight, self.bias) if fast else super().forward(x)


def trouble_with_dense(device: str) -> str:
    """Why there is no other product for dense layers; "" if there is one. It is not part of torch's documented
    interface."""
    if device != "cpu":
        return "there is another product for CPUs only"
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return "it has no oneDNN"
    wrong = difference(FastLinear)
    return wrong and f"oneDNN's product {wrong} here"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@library.custom_op("alexnet::dense", mutates_args=(), device_types="cpu")
def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T + bias, of (n, inputs) and (outputs, inputs)."""
    return _product(x, weight, bias)


@library.custom_op("alexnet::dense_backward", mutates_args=(), device_types="cpu")
def dense_backward(g: Tensor, x: Tensor, weight: Tensor, need_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dense's derivatives for x (where it is needed), weight and bias, from g (n, outputs)."""
    grad_x = _product(g, weight.t()) if need_x else g.new_empty(0)
    return grad_x, _product(g.t(), x.t()), g.sum(0)


def _derive_dense(ctx, g):
    grads = dense_backward(g, *ctx.saved_tensors, ctx.needs_input_grad[0])
    return grads[0] if ctx.needs_input_grad[0] else None, *grads[1:]


dense.register_fake(lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]))
dense_backward.register_fake(lambda g, x, weight, need_x: (
    x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape), g.new_empty(g.shape[1])
))
dense.register_autograd(_derive_dense, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]))


# ---------------------------------------------------------------------------------------------- convolutions


class FastConv2d(nn.Conv2d):
    """nn.Conv2d, with the weights' gradient by a product of two matrices where its map is small."""

    dtypes = (torch.bfloat16,)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fits(x):
            return super().forward(x)
        tensors = [t.to(torch.bfloat16) for t in (x, self.weight, self.bias)]
        return _Convolution.apply(*tensors, self.padding, self.groups)

    def fits(self, x: Tensor) -> bool:
        """Whether x is convolved in bfloat16, to a map that is small enough, by weights that learn."""
        if x.device.type != "cpu" or not torch.is_grad_enabled() or self.bias is None or not self.weight.requires_grad:
            return False
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        dtypes = {x.dtype, self.weight.dtype, self.bias.dtype}
        if not (dtypes <= {torch.float32, torch.bfloat16} if autocast else dtypes == {torch.bfloat16}):
            return False
        if x.ndim != 4 or not x.numel() or (self.stride, self.dilation) != ((1, 1), (1, 1)):
            return False
        if self.padding_mode != "zeros" or not isinstance(self.padding, tuple):
            return False
        sides = zip(x.shape[2:], self.padding, self.kernel_size, strict=True)
        return math.prod([side + 2 * padding - window + 1 for side, padding, window in sides]) <= POSITIONS


class _Convolution(torch.autograd.Function):
    """A convolution with a stride of 1. With X the windows of the inputs, a row for each position of each map, and G
    the gradient that arrives, a row of filters for each:

        grad weight = G.T @ X;   grad bias = the sum of G's rows;   grad x is torch's

    oneDNN's time for grad weight goes by the rows of a map, however short these are.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, padding, groups):
        ctx.save_for_backward(x, weight)
        ctx.options = padding, groups
        return F.conv2d(x, weight, bias, padding=padding, groups=groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x, weight), (padding, groups) = ctx.saved_tensors, ctx.options
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.nn.grad.conv2d_input(x.shape, weight, g, padding=padding, groups=groups)
        height, width = g.shape[2:]
        padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1)
        rows, parts = g.permute(0, 2, 3, 1).flatten(0, 2), []
        for group, inputs in zip(rows.chunk(groups, 1), padded.chunk(groups, 3), strict=True):
            shifts = itertools.product(*map(range, weight.shape[2:]))
            windows = torch.cat([inputs[:, top : top + height, left : left + width] for top, left in shifts], 3)
            parts.append(group.t() @ windows.flatten(0, 2))
        grad = torch.cat(parts).unflatten(1, (*weight.shape[2:], -1)).permute(0, 3, 1, 2)
        return grad_x, grad, rows.sum(0), None, None


# ---------------------------------------------------------------------------------------------- LRN


class TorchLRN(LocalResponseNorm):
    """model.LocalResponseNorm in torch's operations with its derivative written out."""

    def forward(self, x: Tensor) -> Tensor:
        return _LRN.apply(x, self)


class CompiledLRN(TorchLRN):
    """model.LocalResponseNorm by kernels.c."""

    device, dtypes, words = "cpu", (torch.float32, torch.bfloat16), "compiled from kernels.c"

    def __setstate__(self, state) -> None:
        super().__setstate__(state)  # copied, or pickled on another machine
        if trouble_with_lrn(self.device, [self.size]):
            self.__class__ = TorchLRN

    def forward(self, x: Tensor) -> Tensor:
        if self.fits(x):
            return lrn(x, self.columns, self.size, self.alpha / self.size, self.k)
        return super().forward(x)

    def fits(self, x: Tensor) -> bool:
        """Whether the kernel takes x, by its shape, layout, dtype and device."""
        if self.size > WIDEST or self.beta != LRN_BETA or x.ndim != 4 or not 0 < x.numel() < 2**31:
            return False
        if x.shape[1] % self.columns or x.shape[1] > CHANNELS or _layout(x) is None:
            return False
        return x.device.type == self.device and x.dtype in self.dtypes


class TritonLRN(CompiledLRN):
    """model.LocalResponseNorm by Triton."""

    device, dtypes, words = "cuda", (torch.float32, torch.bfloat16, torch.float16), "in Triton"


FAST_LRN = {kind.device: kind for kind in (CompiledLRN, TritonLRN)}
LRNS = (LocalResponseNorm, TorchLRN, *FAST_LRN.values())  # whose places a faster one can take


def trouble_with_lrn(device: str, sizes: Iterable[int] = ()) -> str:
    """Why there is no kernel for LRN over so many channels on a device, "cpu" or "cuda"; "" if there is one. Without
    sizes: over the paper's five."""
    if device not in FAST_LRN:
        return "there is a fast one for CPUs and CUDA only"
    sizes = sorted(sizes) or [LRN_SIZE]
    if sizes[-1] > WIDEST:
        return f"the fast ones take windows of at most {WIDEST} channels"
    for size in sizes:
        missing = compiled(size)[1] if device == "cpu" else "" if triton else "there is no Triton"
        wrong = "" if missing else difference(FAST_LRN[device], size=size)
        if missing or wrong:
            return missing or f"the one {FAST_LRN[device].words} {wrong}"
    return ""


class _LRN(torch.autograd.Function):
    """With s = alpha / n, d[c] what is raised to the power beta, and g the gradient that arrives at b:

        grad[c] = g[c] / d[c] ** beta  -  2 s beta a[c] * (sum of g[j] a[j] / d[j] ** (beta + 1) over j around c)

    Only the input is kept: computing d once more in the cache is as fast as reading it back from memory.
    """

    @staticmethod
    def forward(ctx, a, layer):
        ctx.save_for_backward(a)
        ctx.layer, b = layer, torch.empty_like(a)
        for a_piece, b_piece in _pieces(layer.columns, a, b):
            b_piece.copy_(a_piece * _powers(a_piece, layer)[1])
        return b

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (a,), layer = ctx.saved_tensors, ctx.layer
        grad, factor = torch.empty_like(a), -2 * (layer.alpha / layer.size) * layer.beta
        for a_piece, g_piece, grad_piece in _pieces(layer.columns, a, g, grad):
            d, power = _powers(a_piece, layer)
            direct = g_piece * power
            grad_piece.copy_(direct.addcmul_(a_piece, _window_sum(direct * a_piece / d, layer.size), value=factor))
        return grad, None


def _pieces(columns: int, *tensors: Tensor):
    """Tuples of matching parts of (N, C, H, W) tensors as (n, columns, C / columns, H, W), in one piece on a GPU
    and for torch.compile."""
    first, n = tensors[0], max(1, len(tensors[0]))
    if first.device.type == "cpu" and not torch.compiler.is_compiling():
        n = max(1, CPU_PIECE * n // max(1, first.numel()))
    views = [t.unflatten(1, (columns, t.shape[1] // columns)) for t in tensors]
    return zip(*(v.split(n) for v in views), strict=True)


def _powers(a: Tensor, layer: LocalResponseNorm) -> tuple[Tensor, Tensor]:
    """d and d ** -beta; for the paper's 0.75 as a product of square roots, several times faster than pow."""
    d = _window_sum(wide(a).square(), layer.size).mul_(layer.alpha / layer.size).add_(layer.k)
    if layer.beta != 0.75:
        return d, d.pow(-layer.beta)
    root = d.rsqrt()
    return d, root.sqrt().mul_(root)


def _window_sum(x: Tensor, size: int) -> Tensor:
    """For each channel of (n, columns, C, H, W), the sum over the `size` channels around it in its column."""
    if torch.compiler.is_compiling():  # one expression, which becomes one loop
        padded = F.pad(x, (0, 0, 0, 0, size // 2, size // 2))
        return sum(padded[:, :, first : first + x.shape[2]] for first in range(size))
    total = x.clone()
    for offset in range(1, min(size // 2 + 1, x.shape[2])):
        total[:, :, offset:] += x[:, :, :-offset]
        total[:, :, :-offset] += x[:, :, offset:]
    return total


# ---------------------------------------------------------------------------------------------- LRN in C


@library.custom_op("alexnet::lrn", mutates_args=())
def lrn(a: Tensor, columns: int, size: int, scale: float, k: float) -> Tensor:
    """LRN over `size` channels with beta 0.75; scale is alpha / size. a: (N, C, H, W), dense in one of both layouts."""
    b = torch.empty_like(a)
    _run("lrn_forward", (a, b), columns, size, scale, k)
    return b


@library.custom_op("alexnet::lrn_backward", mutates_args=())
def lrn_backward(a: Tensor, g: Tensor, columns: int, size: int, scale: float, k: float) -> Tensor:
    """lrn's derivative from the gradient g that arrives at its output."""
    g = g.to(a.dtype).contiguous(memory_format=_layout(a))
    grad = torch.empty_like(a)
    _run("lrn_backward", (a, g, grad), columns, size, scale, k)
    return grad


def _keep_lrn(ctx, inputs, output) -> None:
    a, *ctx.options = inputs
    ctx.save_for_backward(a)


def _derive_lrn(ctx, g):
    return lrn_backward(*ctx.saved_tensors, g, *ctx.options), None, None, None, None


lrn.register_fake(lambda a, columns, size, scale, k: torch.empty_like(a))
lrn_backward.register_fake(lambda a, g, columns, size, scale, k: torch.empty_like(a))
lrn.register_autograd(_derive_lrn, setup_context=_keep_lrn)


def _layout(x: Tensor) -> torch.memory_format | None:
    """The layout that a tensor fills without gaps. Where both are right (one channel, one pixel) so is either."""
    for layout in (torch.channels_last, torch.contiguous_format):
        if x.is_contiguous(memory_format=layout):
            return layout
    return None


def _run(name: str, tensors: tuple[Tensor, ...], columns: int, size: int, scale: float, k: float) -> None:
    """Call lrn_forward(a, b) or lrn_backward(a, g, grad): tensors of one shape and layout, the last one is written."""
    layout = _layout(tensors[0])
    if layout is None:
        raise ValueError("lrn takes tensors without gaps, contiguous or channels_last")
    if tensors[0].is_cuda:
        return launch(name, tensors, columns, size, scale, k)
    n, channels, height, width = tensors[0].shape
    if layout == torch.channels_last:
        rows, pixels = n * height * width * columns, 1
    else:
        rows, pixels = n * columns, height * width
    library, trouble = compiled(size)
    if library is None:  # a layer's size was changed after accelerate()
        raise RuntimeError(f"LRN over {size} channels: {trouble}")
    getattr(library, name)(
        *(ctypes.c_void_p(t.data_ptr()) for t in tensors),
        *(ctypes.c_long(number) for number in (rows, channels // columns, pixels)),
        ctypes.c_float(scale), ctypes.c_float(k), torch.get_num_threads(), tensors[0].dtype == torch.bfloat16,
    )


@functools.cache
def compiled(size: int) -> tuple[ctypes.CDLL | None, str]:
    """kernels.c, compiled for this processor and sums over `size` channels, and loaded, and ""; or None and why there
    is none."""
    compiler = os.environ.get("CC", "").strip() or "cc"
    if not shutil.which(compiler.split()[0]):
        return None, f"there is no C compiler {compiler}"
    # The OpenMP that -fopenmp names is the one that torch has loaded already: one set of threads for both.
    flags = [f"-DAROUND={size // 2}", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]
    # gcc's, which compile in 0.4 seconds what -O3 takes 1.1 for, to the same speed; and for compilers without them
    for optimise in (["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"], ["-O3"]):
        failures = suppress(OSError, subprocess.SubprocessError, AttributeError)
        # NFS keeps a file that is loaded, and its folder, whatever is removed
        with failures, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            built = Path(folder) / "kernels.so"
            command = [*compiler.split(), *optimise, *flags, "-o", str(built), str(SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            try:
                loaded = ctypes.CDLL(str(built))
            except OSError:
                if built.exists():
                    place = tempfile.gettempdir()
                    return None, f"kernels.c can't be loaded from {place}; set TMPDIR to a folder without noexec"
                raise
            loaded.lrn_forward, loaded.lrn_backward  # noqa: B018  (raises where they are hidden)
            return loaded, ""
    return None, f"{compiler} can't build kernels.c here"


# ---------------------------------------------------------------------------------------------- LRN on a GPU


def launch(name: str, tensors: tuple[Tensor, ...], columns: int, size: int, scale: float, k: float) -> None:
    """Start the Triton kernel of that name: a program for each TILE_PIXELS x TILE_CHANNELS of a picture. Pictures are
    counted along the grid's first axis, which has room for 2**31; the others take 65,535."""
    a = tensors[0]
    n, channels, height, width = a.shape
    pixels = height * width
    last = _layout(a) == torch.channels_last
    grid = (n, triton.cdiv(pixels, TILE_PIXELS), triton.cdiv(channels, TILE_CHANNELS))
    with torch.cuda.device_of(a):  # Triton starts on the current device, wherever the tensors are
        (_forward_kernel if name == "lrn_forward" else _backward_kernel)[grid](
            *tensors, pixels, channels, channels // columns, channels if last else 1, 1 if last else pixels, scale, k,
            TILE_PIXELS, TILE_CHANNELS, size // 2, num_warps=WARPS,
        )


if triton:
    # In all of them: p are pixels (P, 1), c channels (1, C), of which those of one column are normalised together;
    # AROUND are the channels of a window on either side.

    @triton.jit
    def _near(x, at, p, c, shift, pixels, channels, column, channel_stride):
        """x in float32, `shift` channels further on; 0 beyond the picture and the column."""
        there, first = c + shift, c - c % column
        inside = (p < pixels) & (there < channels) & (there >= first) & (there < first + column)
        return tl.load(x + at + shift * channel_stride, mask=inside, other=0).to(tl.float32)

    @triton.jit
    def _root(a, at, p, c, shift, pixels, channels, column, channel_stride, scale, k, AROUND: tl.constexpr):
        """d ** -0.5, `shift` channels further on, of the column of c."""
        total = tl.zeros_like(at).to(tl.float32)
        for step in tl.static_range(-AROUND, AROUND + 1):
            near = _near(a, at, p, c, shift + step, pixels, channels, column, channel_stride)
            total += near * near
        return tl.rsqrt(k + scale * total)

    @triton.jit
    def _forward_kernel(
        a, b, pixels, channels, column, pixel_stride, channel_stride, scale, k, P: tl.constexpr, C: tl.constexpr,
        AROUND: tl.constexpr,
    ):
        p = tl.program_id(1) * P + tl.arange(0, P)[:, None]
        c = tl.program_id(2) * C + tl.arange(0, C)[None, :]
        at = tl.program_id(0) * pixels * channels + p * pixel_stride + c * channel_stride
        root = _root(a, at, p, c, 0, pixels, channels, column, channel_stride, scale, k, AROUND)
        value = _near(a, at, p, c, 0, pixels, channels, column, channel_stride) * root * tl.sqrt(root)
        tl.store(b + at, value.to(b.dtype.element_ty), mask=(p < pixels) & (c < channels))

    @triton.jit
    def _backward_kernel(
        a, g, grad, pixels, channels, column, pixel_stride, channel_stride, scale, k, P: tl.constexpr, C: tl.constexpr,
        AROUND: tl.constexpr,
    ):
        p = tl.program_id(1) * P + tl.arange(0, P)[:, None]
        c = tl.program_id(2) * C + tl.arange(0, C)[None, :]
        at = tl.program_id(0) * pixels * channels + p * pixel_stride + c * channel_stride
        direct = tl.zeros_like(at).to(tl.float32)
        through = tl.zeros_like(at).to(tl.float32)
        for shift in tl.static_range(-AROUND, AROUND + 1):
            root = _root(a, at, p, c, shift, pixels, channels, column, channel_stride, scale, k, AROUND)
            scaled = _near(g, at, p, c, shift, pixels, channels, column, channel_stride) * root * tl.sqrt(root)
            through += scaled * _near(a, at, p, c, shift, pixels, channels, column, channel_stride) * root * root
            if shift == 0:
                direct = scaled
        value = direct - 1.5 * scale * _near(a, at, p, c, 0, pixels, channels, column, channel_stride) * through
        tl.store(grad + at, value.to(grad.dtype.element_ty), mask=(p < pixels) & (c < channels))


# For `difference`: the formula, its options, and an input's shape.
# LRN's has more channels and pixels than a Triton program takes.
_LRN_EXAMPLE = (LocalResponseNorm, {"columns": 2, "alpha": 1.0}, (2, 66, 9, 8))
EXAMPLES = {
    TorchLRN: _LRN_EXAMPLE,
    CompiledLRN: _LRN_EXAMPLE,
    TritonLRN: _LRN_EXAMPLE,
    FastFReLU: (FReLU, {}, (2, 3, 5, 7)),
    FastSReLU: (SReLU, {}, (2, 3, 5, 7)),
    FastLinear: (nn.Linear, {"in_features": 33, "out_features": 19}, (7, 33)),
    FastConv2d: (nn.Conv2d, {"in_channels": 6, "out_channels": 10, "kernel_size": 3, "padding": 1, "groups": 2},
                 (5, 6, 3, 3)),
}
