"""How fast is this project's LRN? Forward + backward against torch's own, interleaved in one run:

    python -m benchmarks.lrn [--batch 64] [--repeats 9] [--device auto|cuda|cpu] [--json]

The input is what LRN 1 sees in the net at 224 pixels: conv1 and ReLU over pictures of the bundled sample, (batch, 96,
55, 55) float32, in both memory layouts. One round of each is warm-up; then medians and the quartiles' distance.
"""

import json
import statistics
import time

import torch
import torch.nn.functional as F

import utils
from data import sources
from data.cli import Parser, run_script, whole
from model import LRN_ALPHA, LRN_BETA, LRN_K, LRN_SIZE, AlexNet, LocalResponseNorm

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    device = utils.pick_device(args.device)
    contenders = {"model.LocalResponseNorm": LocalResponseNorm(), "F.local_response_norm": torch_lrn}
    result = {"shape": [args.batch, 96, 55, 55], "dtype": "float32", **utils.environment(device), "layouts": {}}
    x = activations(args.batch).to(device)
    for name, layout in LAYOUTS.items():
        inputs = x.to(memory_format=layout, copy=True).requires_grad_()
        times = interleaved(contenders, inputs, args.repeats)
        result["layouts"][name] = {
            contender: {"median_ms": 1000 * statistics.median(t), "spread_ms": 1000 * spread(t)}
            for contender, t in times.items()
        }
    print(json.dumps(result) if args.json else report(result))
    return 0


def torch_lrn(x):
    return F.local_response_norm(x, LRN_SIZE, alpha=LRN_ALPHA, beta=LRN_BETA, k=LRN_K)


def activations(batch: int) -> torch.Tensor:
    """conv1's outputs after ReLU for pictures of the sample, (batch, 96, 55, 55)."""
    pictures = torch.from_numpy(sources.find("sample").splits["train"].pictures[:batch])
    pictures = F.interpolate(pictures[:, None].float(), size=224, mode="bilinear").expand(-1, 3, -1, -1)
    torch.manual_seed(0)
    net = AlexNet(10)
    with torch.no_grad():
        return net.act1(net.conv1(pictures - pictures.mean(0)))


def interleaved(contenders: dict, inputs: torch.Tensor, repeats: int) -> dict:
    """Seconds of `repeats` forward + backward passes of each contender, taken in turns after one round of warm-up."""
    grad = torch.randn_like(inputs)
    times = {name: [] for name in contenders}
    for number in range(repeats + 1):
        for name, norm in contenders.items():
            _wait(inputs)
            began = time.perf_counter()
            norm(inputs).backward(grad)
            _wait(inputs)
            inputs.grad = None
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def _wait(inputs: torch.Tensor) -> None:
    if inputs.is_cuda:
        torch.cuda.synchronize()


def spread(times: list[float]) -> float:
    low, _, high = statistics.quantiles(times, n=4)
    return high - low


def report(result: dict) -> str:
    shape = tuple(result["shape"])
    lines = [f"LRN forward + backward, {shape} {result['dtype']}, {result['device']}, {result['threads']} threads, "
             f"torch {result['torch']}"]
    for layout, contenders in result["layouts"].items():
        slowest = max(c["median_ms"] for c in contenders.values())
        for name, entry in contenders.items():
            lines.append(
                f"{layout:<14} {name:<24} {entry['median_ms']:8.1f} ms (quartiles {entry['spread_ms']:.1f} apart)"
                f"   {slowest / entry['median_ms']:5.2f}x"
            )
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.lrn", description="Time LRN, forward + backward.")
    parser.add_argument("--batch", type=whole(2), default=64, help="pictures (default: %(default)s)")
    parser.add_argument("--repeats", type=whole(3), default=9, help="timed rounds (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")
    return parser


if __name__ == "__main__":
    run_script(main)
