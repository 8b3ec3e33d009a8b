"""What the benchmarks share: turns, medians, and the limits that the machine sets."""

import os
import statistics
import time

import numpy as np
import torch

from checkpoints.run import environment
from data import sources
from kernels import trouble_with_dense
from utils import UserError, whole

GPU_CALLS = 20


def add_options(parser) -> None:
    """What every benchmark on a device takes."""
    parser.add_argument("--repeats", type=whole(3), default=9, metavar="N", help="timed rounds (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")


def add_net_options(parser) -> None:
    """What benchmarks of nets take besides."""
    parser.add_argument("--size", type=whole(63), default=224, metavar="N", help="pixels a side (default: %(default)s)")
    parser.add_argument("--classes", type=whole(1), default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                        help="bf16: autocast, for all of them (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only contenders whose names hold one of these words")


def chosen(contenders: dict, words: list[str] | None) -> dict:
    """The contenders whose names hold one of the words, or all."""
    found = {name: one for name, one in contenders.items() if not words or any(word in name for word in words)}
    if not found:
        raise UserError(f"--only {' '.join(words)}: no contender has that in its name")
    return found


def machine(device: torch.device) -> dict:
    """What it was measured on, and how busy that was."""
    return environment(device) | {"load": os.getloadavg()[0]}


def interleaved(contenders: dict, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each contender, taken in turns after one call of each as warm-up."""
    times = {name: [] for name in contenders}
    for number in range(repeats + 1):
        for name, call in contenders.items():
            seconds = timed(call, device)
            if number:
                times[name].append(seconds)
    return times


def timed(call, device: torch.device) -> float:
    """Seconds of a call; on a GPU the mean of GPU_CALLS between two events, so that starting one does not count."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()  # takes its memory anew
    torch.cuda.synchronize()
    start.record()
    for _ in range(GPU_CALLS):
        call()
    end.record()
    end.synchronize()
    torch.cuda.empty_cache()  # the next contender finds the memory free
    return start.elapsed_time(end) / 1000 / GPU_CALLS


def milliseconds(seconds: list[float]) -> dict:
    low, _, high = statistics.quantiles(seconds, n=4)
    median = statistics.median(seconds)
    return {"median_ms": 1000 * median, "quartiles_ms": [1000 * low, 1000 * high], "n": len(seconds)}


def copy_rate(device: torch.device, numbers: int = 1 << 26) -> float:
    """Bytes a second, read and written, of the fastest of ten copies of a tensor of that many float32."""
    a, b = torch.ones(numbers, device=device), torch.zeros(numbers, device=device)
    times = interleaved({"copy": lambda: b.copy_(a)}, 10, device)["copy"]
    return 2 * 4 * numbers / min(times)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in the fastest of ten products of square matrices, 2048 wide on a CPU and
    8192 on a GPU; on a CPU the faster of torch's and oneDNN's, if this torch has the latter."""
    width = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    contenders = {"torch": lambda: a @ b}
    if not trouble_with_dense(device.type):
        contenders["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    times = interleaved(contenders, 10, device)
    return 2 * width**3 / min(min(t) for t in times.values())


def pictures(count: int, size: int) -> torch.Tensor:
    """Pictures of the bundled sample as a net's input: (count, 3, size, size), 0..255 minus their mean."""
    sample = sources.find("sample").splits["train"].pictures
    stored = torch.from_numpy(sample[np.arange(count) % len(sample)])
    scaled = torch.nn.functional.interpolate(stored[:, None].float(), size=size, mode="bilinear").expand(-1, 3, -1, -1)
    return scaled - scaled.mean(0)
