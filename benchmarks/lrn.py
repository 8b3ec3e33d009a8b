"""How fast is LRN, forward + backward? In turns in one run:

    python -m benchmarks.lrn [--batch 64] [--dtype float32|bfloat16|float16] [--size 5] [--repeats 9] [--device auto]
                             [--json]

kernels.py's LRN, in C or Triton and in torch's operations, and model.py's formula, against torch's own function, eager
and under torch.compile; in bfloat16 and float16 torch's under autocast, as nets call it. The input is what LRN 1 sees
in the net at 224 pixels: conv1 and ReLU over pictures of the bundled sample, (batch, 96, 55, 55), in both layouts. The
limit is five tensors (forward one read, one written, backward two read, one written) over the rate of a copy. All run
with memory kept (memory.keep), as train.py does.
"""

import functools
import json

import torch
import torch.nn.functional as F

import memory
import utils
from benchmarks.timing import add_options, copy_rate, interleaved, machine, milliseconds, pictures
from kernels import FAST_LRN, TorchLRN, trouble_with_lrn
from model import LRN_ALPHA, LRN_BETA, LRN_K, LRN_SIZE, AlexNet, LocalResponseNorm
from utils import Parser, run_script, whole

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TORCHS = "F.local_response_norm"


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    device = utils.pick_device(args.device)
    shape = [args.batch, 96, 55, 55]
    result = {"shape": shape, "dtype": args.dtype, "size": args.size, **machine(device), "layouts": {}}
    x = activations(args.batch).to(device, getattr(torch, args.dtype))
    for name, layout in LAYOUTS.items():
        inputs = x.to(memory_format=layout, copy=True).requires_grad_()
        result["layouts"][name] = race(contenders(inputs, args.size), inputs, args.repeats)
    result["copy_rate"] = copy_rate(device)
    result["bytes"] = 5 * x.numel() * x.element_size()
    print(json.dumps(result) if args.json else report(result))
    return 0


def torch_lrn(x, size: int):
    """Alone it takes no bfloat16 on a CPU: under autocast its pooling is done in float32."""
    with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
        return F.local_response_norm(x, size, alpha=LRN_ALPHA, beta=LRN_BETA, k=LRN_K)


def contenders(inputs: torch.Tensor, size: int) -> dict:
    """Functions of the input by name; None where one can't run here."""
    device, torchs = inputs.device.type, functools.partial(torch_lrn, size=size)
    fast = None if trouble_with_lrn(device, [size]) else FAST_LRN[device](size=size)
    kernel = "kernels.py, Triton" if inputs.is_cuda else "kernels.py, C"
    return {
        TORCHS: torchs, f"{TORCHS}, torch.compile": torch.compile(torchs),
        "model.LocalResponseNorm": LocalResponseNorm(size=size), "kernels.py, torch": TorchLRN(size=size),
        kernel: fast if fast and fast.fits(inputs) else None,
    }


def activations(batch: int) -> torch.Tensor:
    """conv1's outputs after ReLU for pictures of the sample, (batch, 96, 55, 55)."""
    torch.manual_seed(0)
    net = AlexNet(10)
    with torch.no_grad():
        return net.act1(net.conv1(pictures(batch, 224)))


def race(functions: dict, inputs: torch.Tensor, repeats: int) -> dict:
    """Times of forward + backward; a function that fails at its first call is named with the reason."""
    grad, calls, found = torch.randn_like(inputs), {}, {}
    for name, function in functions.items():
        if function is None:
            found[name] = {"skipped": "not for this machine, dtype and size"}
            continue

        def call(function=function):
            inputs.grad = None
            function(inputs).backward(grad)

        try:
            call()
            calls[name] = call
        except Exception as error:  # no compiler, not for this dtype: the others go on
            found[name] = {"skipped": f"{type(error).__name__}: {utils.one_line(error)}"}
    times = interleaved(calls, repeats, inputs.device)
    return {name: found.get(name) or milliseconds(times[name]) for name in functions}


def report(result: dict) -> str:
    limit = 1000 * result["bytes"] / result["copy_rate"]
    lines = [f"LRN over {result['size']} channels, forward + backward, {tuple(result['shape'])} {result['dtype']}, "
             f"{result['device']}, "
             f"{result['threads']} threads, torch {result['torch']}, load {result['load']:.2f}"]
    for layout, found in result["layouts"].items():
        for name, entry in found.items():
            if "skipped" in entry:
                lines.append(f"{layout:<14} {name:<38}       -  skipped: {entry['skipped']}")
                continue
            median, (low, high) = entry["median_ms"], entry["quartiles_ms"]
            ratios = [
                f"{found[peer]['median_ms'] / median:5.1f}x" if "median_ms" in found[peer] else "    -"
                for peer in (TORCHS, f"{TORCHS}, torch.compile")
            ]
            lines.append(
                f"{layout:<14} {name:<38}{median:8.2f} ms  (quartiles {low:.2f}..{high:.2f})  {ratios[0]} torch's, "
                f"{ratios[1]} torch's compiled, {limit / median:.0%} of the limit"
            )
    rate = result["copy_rate"] / 1e9
    lines.append(f"limit: {result['bytes'] / 1e6:.0f} MB at {rate:.0f} GB/s, {limit:.2f} ms")
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.lrn", description="Time LRN, forward + backward.")
    parser.add_argument("--batch", type=whole(2), default=64, help="pictures (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="default: %(default)s")
    parser.add_argument("--size", type=int, choices=range(1, 20, 2), default=LRN_SIZE, help="channels of a window "
                        "(default: %(default)s, as in the paper)")
    add_options(parser)
    return parser


if __name__ == "__main__":
    memory.keep()
    run_script(main)
