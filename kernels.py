"""The fast parts of the net, and accelerate(net), which swaps them in:

    LRN on a CPU      kernels.c, compiled when it is first needed (a fifth of a second); float32
    LRN on a GPU      Triton; float32, bfloat16, float16, sums in float32
    dense on a CPU    oneDNN's product instead of MKL's, which leaves half of an AMD processor unused; float32

They compute what model.py's LocalResponseNorm and torch's Linear compute, the formulas are there, and share their
weights, so a checkpoint is the same with and without. Whatever a fast part can't do goes to the plain one: other
devices, dtypes, layouts, LRN over other than 5 channels, no compiler, no Triton.

The Triton kernels have run in Triton's interpreter only, on no GPU yet: until they have, they are used when asked for.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor, library, nn

from model import LRN_BETA, LRN_SIZE, LocalResponseNorm

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's builds for a CPU come without
    triton = None

SOURCE = Path(__file__).with_name("kernels.c")
CHANNELS = 1024  # what kernels.c keeps of one pixel lies on the stack of its thread
SAME = 1e-4  # of the largest number: how far a fast LRN may be from the plain one when it is first used
FAST_LRN = {"cpu": "compiled from kernels.c", "cuda": "in Triton"}
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
TILE_PIXELS, TILE_CHANNELS = 64, 32  # what one Triton program works on


def accelerate(net: nn.Module, *, gpu_kernels: bool = False, say=print) -> nn.Module:
    """Put the fast parts for the device that a net is on into it, in place, and return it: each LocalResponseNorm of
    model.py and each nn.Linear in it, unless it has hooks, is replaced by a module with the same parameters.
    gpu_kernels: use the Triton LRN, too, on a GPU. say: called with one line that tells what was chosen and why. The
    fast parts can be differentiated once, backwards."""
    device = next((p.device for p in net.parameters()), torch.device("cpu")).type
    lrn_trouble, linear_trouble = trouble_with_lrn(device, gpu_kernels), trouble_with_linear(device)
    chosen = {}
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LocalResponseNorm):
                chosen["LRN"] = f"of model.py ({lrn_trouble})" if lrn_trouble else FAST_LRN[device]
            elif isinstance(layer, nn.Linear):
                chosen["dense layers"] = f"of torch ({linear_trouble})" if linear_trouble else "by oneDNN"
            hooked = layer._forward_hooks or layer._forward_pre_hooks  # pruning and weight norm have them, too
            if type(layer) is LocalResponseNorm and not lrn_trouble and not hooked:
                setattr(parent, name, FastLRN(layer, device))
            elif type(layer) is nn.Linear and not linear_trouble and not hooked:
                setattr(parent, name, FastLinear(layer))
    line = ", ".join(f"{what} {how}" for what, how in chosen.items()) or "nothing to accelerate"
    say(f"{line} (in float32)" if device == "cpu" and chosen else line)
    return net


def trouble_with_lrn(device: str, gpu_kernels: bool) -> str:
    """Why there is no fast LRN on a device, "cpu" or "cuda"; "" if there is one."""
    if device == "cpu":
        return compiled()[1]
    if device == "cuda":
        return triton_trouble() if gpu_kernels else "the Triton one has run on no GPU yet and has to be asked for"
    return "there is a fast one for CPUs and CUDA only"


def trouble_with_linear(device: str) -> str:
    if device != "cpu":
        return "there is another product for CPUs only"
    return "" if onednn() else "it has no oneDNN"


class FastLRN(LocalResponseNorm):
    """model.LocalResponseNorm, by kernels.c on a CPU or Triton on a GPU where they can."""

    def __init__(self, plain: LocalResponseNorm, device: str = "cpu"):
        super().__init__(plain.columns, plain.size, plain.alpha, plain.beta, plain.k)
        self.training, self.device, self.dtypes = plain.training, device, DTYPES[device]

    def __setstate__(self, state) -> None:
        super().__setstate__(state)  # copied, or pickled on another machine
        if trouble_with_lrn(self.device, gpu_kernels=True):
            self.device = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.fits(x):
            return lrn(x, self.columns, self.alpha / self.size, self.k)
        return super().forward(x)

    def fits(self, x: Tensor) -> bool:
        """Whether a fast path takes x, by its shape, layout, dtype and device."""
        if (self.size, self.beta) != (LRN_SIZE, LRN_BETA) or x.ndim != 4 or not 0 < x.numel() < 2**31:
            return False
        if x.shape[1] % self.columns or x.shape[1] > CHANNELS or _layout(x) is None:
            return False
        return x.device.type == self.device and x.dtype in self.dtypes


class FastLinear(nn.Linear):
    """nn.Linear, by oneDNN where it can: float32 on a CPU, without autocast."""

    def __init__(self, plain: nn.Linear):
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
        self.weight, self.bias, self.training = plain.weight, plain.bias, plain.training

    def forward(self, x: Tensor) -> Tensor:
        fast = (
            x.device.type == "cpu" and x.ndim == 2 and x.numel() and self.weight.numel() and self.bias is not None
            and x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        )
        return dense(x, self.weight, self.bias) if fast else super().forward(x)


# ---------------------------------------------------------------------------------------------- dense layers


@functools.cache
def onednn() -> bool:
    """Whether this torch has the product that we use: it is not part of torch's documented interface."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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


@dense.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@dense_backward.register_fake
def _(g, x, weight, need_x):
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape), g.new_empty(g.shape[1])


def _keep_dense(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _derive_dense(ctx, g):
    x, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = dense_backward(g, x, weight, ctx.needs_input_grad[0])
    return grad_x if ctx.needs_input_grad[0] else None, grad_weight, grad_bias


dense.register_autograd(_derive_dense, setup_context=_keep_dense)


# ---------------------------------------------------------------------------------------------- LRN


@library.custom_op("alexnet::lrn", mutates_args=())
def lrn(a: Tensor, columns: int, scale: float, k: float) -> Tensor:
    """model._LRN for 5 channels and beta 0.75; scale is alpha / 5. a: (N, C, H, W), dense in one of both layouts."""
    b = torch.empty_like(a)
    _run("lrn_forward", (a, b), columns, scale, k)
    return b


@library.custom_op("alexnet::lrn_backward", mutates_args=())
def lrn_backward(a: Tensor, g: Tensor, columns: int, scale: float, k: float) -> Tensor:
    """lrn's derivative from the gradient g that arrives at its output."""
    g = g.to(a.dtype).contiguous(memory_format=_layout(a))
    grad = torch.empty_like(a)
    _run("lrn_backward", (a, g, grad), columns, scale, k)
    return grad


@lrn.register_fake
def _(a, columns, scale, k):
    return torch.empty_like(a)


@lrn_backward.register_fake
def _(a, g, columns, scale, k):
    return torch.empty_like(a)


def _keep_lrn(ctx, inputs, output) -> None:
    a, *ctx.options = inputs
    ctx.save_for_backward(a)


def _derive_lrn(ctx, g):
    return lrn_backward(ctx.saved_tensors[0], g, *ctx.options), None, None, None


lrn.register_autograd(_derive_lrn, setup_context=_keep_lrn)


def _layout(x: Tensor) -> torch.memory_format | None:
    """The layout that a tensor fills without gaps. Where both are right (one channel, one pixel) so is either."""
    for layout in (torch.channels_last, torch.contiguous_format):
        if x.is_contiguous(memory_format=layout):
            return layout
    return None


def _run(name: str, tensors: tuple[Tensor, ...], columns: int, scale: float, k: float) -> None:
    """Call lrn_forward(a, b) or lrn_backward(a, g, grad): tensors of one shape and layout, the last one is written."""
    if _layout(tensors[0]) is None:
        raise ValueError("lrn takes tensors without gaps, contiguous or channels_last")
    if tensors[0].is_cuda:
        launch(name, tensors, columns, scale, k)
    else:
        _call(compiled()[0], name, tensors, columns, scale, k)


def _call(loaded: ctypes.CDLL, name: str, tensors: tuple[Tensor, ...], columns: int, scale: float, k: float) -> None:
    n, channels, height, width = tensors[0].shape
    if _layout(tensors[0]) == torch.channels_last:
        rows, pixels = n * height * width * columns, 1
    else:
        rows, pixels = n * columns, height * width
    getattr(loaded, name)(
        *(ctypes.c_void_p(t.data_ptr()) for t in tensors),
        *(ctypes.c_long(number) for number in (rows, channels // columns, pixels)),
        ctypes.c_float(scale), ctypes.c_float(k), torch.get_num_threads(),
    )


@functools.cache
def compiled() -> tuple[ctypes.CDLL | None, str]:
    """kernels.c, compiled for this processor and loaded, and ""; or None and why there is none."""
    compiler = os.environ.get("CC") or "cc"
    if not shutil.which(compiler.split()[0]):
        return None, f"there is no C compiler {compiler}"
    # The OpenMP that it names is the one that torch has loaded already: one set of threads for both.
    flags = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "kernels.so"
            command = [*compiler.split(), *flags, "-o", str(built), str(SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            loaded = ctypes.CDLL(str(built))
            loaded.lrn_forward, loaded.lrn_backward  # noqa: B018  (raises where they are hidden)
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None, f"{compiler} can't build kernels.c here"
    if not _agrees(functools.partial(_call, loaded), "cpu"):
        return None, f"what {compiler} makes of kernels.c is wrong"
    return loaded, ""


@torch.inference_mode(False)
@torch.enable_grad()
def _agrees(run, device) -> bool:
    """Whether a fast LRN gives what the plain one gives, in both layouts."""
    numbers = torch.arange(2 * 12 * 5 * 7, dtype=torch.float32, device=device)
    plain = LocalResponseNorm(columns=2, alpha=1.0)
    for layout in (torch.contiguous_format, torch.channels_last):
        a, g = ((100 * f(numbers)).view(2, 12, 5, 7).contiguous(memory_format=layout) for f in (torch.sin, torch.cos))
        b, grad = torch.empty_like(a), torch.empty_like(a)
        run("lrn_forward", (a, b), 2, plain.alpha / plain.size, plain.k)
        run("lrn_backward", (a, g, grad), 2, plain.alpha / plain.size, plain.k)
        expected = plain(a.requires_grad_())
        (expected_grad,) = torch.autograd.grad(expected, a, g)
        for got, right in ((b, expected), (grad, expected_grad)):
            if not (got - right).abs().max() <= SAME * right.abs().max():
                return False
    return True


# ---------------------------------------------------------------------------------------------- LRN on a GPU


@functools.cache
def triton_trouble() -> str:
    """Why the Triton kernels can't be used on this machine's GPU; "" if they can."""
    if triton is None:
        return "there is no Triton"
    if not torch.cuda.is_available():
        return "there is no GPU"
    try:
        return "" if _agrees(launch, "cuda") else "what Triton makes of its kernels is wrong here"
    except Exception as error:  # Triton's compiler raises nearly anything on a GPU that it does not know
        return f"Triton can't build its kernels here: {type(error).__name__}"


def launch(name: str, tensors: tuple[Tensor, ...], columns: int, scale: float, k: float) -> None:
    """Start the Triton kernel of that name: a program for TILE_PIXELS x TILE_CHANNELS of each picture."""
    a = tensors[0]
    n, channels, height, width = a.shape
    pixels = height * width
    last = _layout(a) == torch.channels_last
    grid = (triton.cdiv(pixels, TILE_PIXELS), triton.cdiv(channels, TILE_CHANNELS), n)
    (_forward_kernel if name == "lrn_forward" else _backward_kernel)[grid](
        *tensors, pixels, channels, channels // columns, channels if last else 1, 1 if last else pixels, scale, k,
        TILE_PIXELS, TILE_CHANNELS,
    )


if triton:
    # In all of them: p are pixels (P, 1), c channels (1, C), of which those of one column are normalised together.

    @triton.jit
    def _near(x, at, p, c, shift, pixels, channels, column, channel_stride):
        """x in float32, `shift` channels further on; 0 beyond the picture and the column."""
        there = c + shift
        inside = (p < pixels) & (there >= 0) & (there < channels) & ((there + column) // column == c // column + 1)
        return tl.load(x + at + shift * channel_stride, mask=inside, other=0).to(tl.float32)

    @triton.jit
    def _root(a, at, p, c, shift, pixels, channels, column, channel_stride, scale, k):
        """d ** -0.5, `shift` channels further on, of the column of c."""
        total = tl.zeros_like(at).to(tl.float32)
        for step in tl.static_range(-2, 3):
            near = _near(a, at, p, c, shift + step, pixels, channels, column, channel_stride)
            total += near * near
        return tl.rsqrt(k + scale * total)

    @triton.jit
    def _forward_kernel(
        a, b, pixels, channels, column, pixel_stride, channel_stride, scale, k, P: tl.constexpr, C: tl.constexpr
    ):
        p = tl.program_id(0) * P + tl.arange(0, P)[:, None]
        c = tl.program_id(1) * C + tl.arange(0, C)[None, :]
        at = tl.program_id(2) * pixels * channels + p * pixel_stride + c * channel_stride
        root = _root(a, at, p, c, 0, pixels, channels, column, channel_stride, scale, k)
        value = _near(a, at, p, c, 0, pixels, channels, column, channel_stride) * root * tl.sqrt(root)
        tl.store(b + at, value.to(b.dtype.element_ty), mask=(p < pixels) & (c < channels))

    @triton.jit
    def _backward_kernel(
        a, g, grad, pixels, channels, column, pixel_stride, channel_stride, scale, k, P: tl.constexpr, C: tl.constexpr
    ):
        p = tl.program_id(0) * P + tl.arange(0, P)[:, None]
        c = tl.program_id(1) * C + tl.arange(0, C)[None, :]
        at = tl.program_id(2) * pixels * channels + p * pixel_stride + c * channel_stride
        direct = tl.zeros_like(at).to(tl.float32)
        through = tl.zeros_like(at).to(tl.float32)
        for shift in tl.static_range(-2, 3):
            root = _root(a, at, p, c, shift, pixels, channels, column, channel_stride, scale, k)
            scaled = _near(g, at, p, c, shift, pixels, channels, column, channel_stride) * root * tl.sqrt(root)
            through += scaled * _near(a, at, p, c, shift, pixels, channels, column, channel_stride) * root * root
            if shift == 0:
                direct = scaled
        value = direct - 1.5 * scale * _near(a, at, p, c, 0, pixels, channels, column, channel_stride) * through
        tl.store(grad + at, value.to(grad.dtype.element_ty), mask=(p < pixels) & (c < channels))
