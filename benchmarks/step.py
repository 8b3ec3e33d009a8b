"""How fast is a training step (forward, loss, backward, update)? Against what people run instead, in one run:

    python -m benchmarks.step [--size 224] [--batch 64] [--classes 1000] [--precision fp32|bf16] [--repeats 9]
        [--only WORD ...] [--device auto] [--json]

The usual module has the same layers as AlexNet() with torch's parts: conv, ReLU, nn.LocalResponseNorm, max-pool,
nn.Dropout, torch.optim.SGD. It runs as it is usually written, and tuned in every combination that its best user would
try: fused SGD; eager and compiled; contiguous and channels_last; on a CPU with and without this repository's way
with memory (memory.keep). The ratio that counts is against the fastest of these. With --precision bf16 all run
under autocast, and the usual module and this repository in fp32 beside them.

Every contender is a process of its own (on a GPU the peers keep torch's TF32 in fp32 convolutions, this repository has
none); they take turns, two steps each, of which the second counts, after three of warm-up; what one keeps goes back to
Linux after its turn. Pictures are those of the bundled sample. Memory is the most that a step takes beyond what the
process held before it made its net. The limit is the step's multiply-adds in convolutions and dense layers over the
rate of one large matrix product.
"""

import itertools
import json
import multiprocessing
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import memory
import utils
from benchmarks.timing import (
    add_net_options,
    add_options,
    chosen,
    machine,
    milliseconds,
    pictures,
    product_rate,
    timed,
)
from kernels import accelerate
from model import LRN_ALPHA, LRN_BETA, LRN_K, LRN_SIZE, AlexNet
from recipe import make_optimizer
from train import train_step
from utils import Parser, run_script, whole


class Contender(NamedTuple):
    net: str
    fused: bool = True  # the usual module's SGD; this repository's always is
    channels_last: bool = False
    compiled: bool = False
    keep_memory: bool = False  # a matter of CPUs
    fp32: bool = False  # whatever --precision says


USUAL, THIS = "usual module", "this"
WORDS = ("channels_last", "torch.compile", "memory kept")
TUNED = {
    ", ".join([f"{USUAL}, fused SGD", *(word for word, on in zip(WORDS, form, strict=True) if on)]):
    Contender("usual", True, *form) for form in itertools.product((False, True), repeat=len(WORDS))
}
CONTENDERS = {
    USUAL: Contender("usual", fused=False),
    **TUNED,
    "torchvision's alexnet (another net)": Contender("torchvision", channels_last=True, keep_memory=True),
    f"{THIS}, --kernels off": Contender("plain", channels_last=True, keep_memory=True),
    THIS: Contender("fast", channels_last=True, keep_memory=True),
    f"{THIS}, memory not kept": Contender("fast", channels_last=True),
    f"{THIS}, --compile": Contender("fast", channels_last=True, compiled=True, keep_memory=True),
    f"{USUAL}, in fp32": Contender("usual", fused=False, fp32=True),
    f"{THIS}, in fp32": Contender("fast", channels_last=True, keep_memory=True, fp32=True),
}
PARTS = {  # what a profile's operators are part of, by a piece of their names
    "convolutions": ("convolution", "conv2d"), "dense layers": ("addmm", "::mm", "linear", "dense"),
    "max-pools": ("max_pool",), "ReLU": ("threshold", "clamp_min", "relu"), "dropout's masks": ("bernoulli", "random_"),
    "update": ("sgd", "SGD", "::mul_"),
    # The usual LRN is made of these; dropout's product with its mask, a few ms at most, comes along.
    "LRN": ("lrn", "LRN", "avg_pool3d", "AvgPool3D", "pow", "Pow", "::div", "DivB", "::mul", "MulB", "neg"),
}


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    device = utils.pick_device(args.device)
    able = {
        name: one for name, one in CONTENDERS.items()
        if (device.type == "cpu" or "memory" not in name) and (args.precision != "fp32" or not one.fp32)
    }
    names = list(chosen(able, args.only))
    result = {"size": args.size, "batch": args.batch, "precision": args.precision, **machine(device)}
    result["contenders"] = race(names, args, device)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    result["flops"] = step_flops(args.size, args.batch, args.classes)
    result["product_rate"] = product_rate(device, dtype)
    print(json.dumps(result) if args.json else report(result))
    return 0


def race(names: list[str], args, device: torch.device) -> dict:
    """Each contender's times, memory in MB and parts, or why it did not run."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=contend, args=(theirs, name, args, device), daemon=True))
        processes[-1].start()
        theirs.close()
    found = {name: {"seconds": []} for name in names}
    order = ["warm up", *["step"] * args.repeats, "describe"]
    for word in order:
        for name in names:  # one after the other: only one computes at a time
            if "skipped" in found[name]:
                continue
            try:
                pipes[name].send(word)
                answer = pipes[name].recv()
            except (EOFError, OSError):
                answer = "its process ended"
            if isinstance(answer, str):
                found[name] = {"skipped": answer}
            elif isinstance(answer, float):
                found[name]["seconds"].append(answer)
            elif answer:
                found[name] |= milliseconds(found[name].pop("seconds")) | answer
    for process in processes:
        process.join(20)
    return found


def contend(connection, name: str, args, device: torch.device) -> None:
    """A contender's process: does what it is told, and answers None, seconds, a description, or in words why not."""
    contender = CONTENDERS[name]
    if contender.keep_memory:
        memory.keep()
    if contender.net in ("plain", "fast"):
        utils.no_tf32()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    step = None
    while True:
        word = connection.recv()
        try:
            if word == "warm up":
                import_what(contender)
                before = resident(device)
                step = make_step(contender, args, device)
                for _ in range(3):
                    step()
                give_memory_back(device)
                connection.send(None)
            elif word == "step":
                step()  # the others have had the caches since
                seconds = timed(step, device)
                give_memory_back(device)
                connection.send(seconds)
            else:
                most = peak(step, before, device)
                spent = parts(step, device) if name in (USUAL, THIS) else None
                connection.send({"memory_mb": most, "parts_ms": spent})
                return
        except Exception as error:  # a peer that is not installed or can't run here is named, the others go on
            connection.send(f"{type(error).__name__}: {utils.one_line(error)}")
            return


def give_memory_back(device: torch.device) -> None:
    """The next contender finds the memory free that torch's allocator, or glibc, keeps for the next step."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    memory.hand_back()


def import_what(contender: Contender) -> None:
    """Import what the step will, so that its code does not count as the step's memory."""
    if contender.net == "torchvision":
        import torchvision.models  # noqa: F401
    if contender.compiled:
        import torch._inductor.compile_fx  # noqa: F401


def make_step(contender: Contender, args, device: torch.device):
    """A training step as a function without arguments."""
    torch.manual_seed(0)
    layout = torch.channels_last if contender.channels_last else torch.contiguous_format
    images = pictures(args.batch, args.size).to(device).contiguous(memory_format=layout)
    labels = torch.arange(args.batch, device=device) % args.classes
    net = make_net(contender.net, args.size, args.classes).to(device, memory_format=layout).train()
    if contender.net in ("usual", "torchvision"):
        optimizer = torch.optim.SGD(
            net.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=contender.fused or None
        )
    else:
        optimizer = make_optimizer(net, recipe="2012", lr=1e-4, momentum=0.9, weight_decay=5e-4)
    if contender.net == "fast":
        accelerate(net)
    model = torch.compile(net) if contender.compiled else net
    precision = "fp32" if contender.fp32 else args.precision
    return lambda: train_step(model, optimizer, images, labels, precision)


def make_net(kind: str, size: int, classes: int) -> nn.Module:
    if kind == "usual":
        return usual_module(size, classes)
    if kind == "torchvision":
        from torchvision.models import alexnet

        return alexnet(num_classes=classes)
    return AlexNet(classes, image_size=size)


def usual_module(size: int, classes: int) -> nn.Module:
    """The paper's table as it is usually written down."""
    def conv(inputs, outputs, kernel, **options):
        return nn.Conv2d(inputs, outputs, kernel, **options), nn.ReLU(inplace=True)

    def norm():
        return nn.LocalResponseNorm(LRN_SIZE, LRN_ALPHA, LRN_BETA, LRN_K)

    side = AlexNet(1, image_size=size).fc6.in_features
    return nn.Sequential(
        *conv(3, 96, 11, stride=4, padding=2), norm(), nn.MaxPool2d(3, 2), *conv(96, 256, 5, padding=2), norm(),
        nn.MaxPool2d(3, 2), *conv(256, 384, 3, padding=1), *conv(384, 384, 3, padding=1), *conv(384, 256, 3, padding=1),
        nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(side, 4096), nn.ReLU(inplace=True), nn.Dropout(),
        nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4096, classes),
    )


def resident(device: torch.device) -> float:
    """MB that this process holds now, on the device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 1e6
    return _status("VmRSS")


def peak(step, before: float, device: torch.device) -> float | None:
    """MB beyond `before` at the worst moment of a step; None where Linux, in a sandbox, does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e6 - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size so far
    except OSError:
        return None
    step()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1000


def parts(step, device: torch.device) -> dict[str, float]:
    """Where a step's time goes, in ms on the device: the mean of three steps after two that are not counted."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would talk on stderr
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU] + [activity.CUDA] * (device.type == "cuda")
    schedule = torch.profiler.schedule(wait=0, warmup=2, active=3, repeat=1)
    with torch.profiler.profile(activities=kinds, schedule=schedule) as profile:
        for _ in range(5):
            step()
            profile.step()
    spent = dict.fromkeys([*PARTS, "everything else"], 0.0)
    for event in profile.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a GPU's kernels are listed once more under the operators that start them
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        part = next((p for p, words in PARTS.items() if any(word in event.key for word in words)), "everything else")
        spent[part] += own / 1000 / 3
    return spent


def step_flops(size: int, batch: int, classes: int) -> int:
    """Two for each multiply-add of the net's convolutions and dense layers, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    net = AlexNet(classes, image_size=size, lrn=False, dropout=0).to("meta")
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(batch, 3, size, size, device="meta")).sum().backward()
    return counter.get_total_flops()


def report(result: dict) -> str:
    found, batch = result["contenders"], result["batch"]
    limit = 1000 * result["flops"] / result["product_rate"]
    times = {name: entry["median_ms"] for name, entry in found.items() if "median_ms" in entry}
    fastest = min((name for name in times if name == USUAL or name in TUNED), key=times.get, default=None)
    lines = [
        f"training step, {batch} x 3 x {result['size']} x {result['size']}, {result['precision']}, {result['device']}, "
        f"{result['threads']} threads, torch {result['torch']}, load {result['load']:.2f}",
        f"{'':<62}{'ms':>8}{'quartiles':>16}{'images/s':>10}{'x usual':>9}{'x fastest':>11}{'MB':>7}{'of limit':>10}",
    ]
    for name, entry in found.items():
        if "skipped" in entry:
            lines.append(f"{name:<62}{'-':>8}  skipped: {entry['skipped']}")
            continue
        median, (low, high) = entry["median_ms"], entry["quartiles_ms"]
        usual, best = (f"{times[peer] / median:.2f}" if peer in times else "-" for peer in (USUAL, fastest))
        most = "-" if entry["memory_mb"] is None else f"{entry['memory_mb']:.0f}"
        share = "-" if CONTENDERS[name].fp32 else f"{limit / median:.0%}"  # the limit is that of --precision
        lines.append(
            f"{name:<62}{median:>8.1f}{f'{low:.1f}..{high:.1f}':>16}{1000 * batch / median:>10.0f}{usual:>9}{best:>11}"
            f"{most:>7}{share:>10}"
        )
    rate = result["product_rate"] / 1e9
    lines.append(f"limit: {result['flops'] / 1e9:.0f} GFLOP at {rate:.0f} GFLOP/s, {limit:.1f} ms")
    if fastest:
        lines.append(f"the fastest form of the usual module: {fastest}")
    for name in (USUAL, THIS):
        spent = found.get(name, {}).get("parts_ms") or {}
        whole_step = sum(spent.values())
        shares = ", ".join(f"{part} {ms:.1f} ({ms / whole_step:.0%})" for part, ms in spent.items())
        if spent:
            lines.append(f"where the time of '{name}' goes, ms: {shares}")
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.step", description="Time a training step against its peers.")
    parser.add_argument("--batch", type=whole(1), default=64, metavar="N", help="pictures (default: %(default)s)")
    add_net_options(parser)
    add_options(parser)
    return parser


if __name__ == "__main__":
    run_script(main)
