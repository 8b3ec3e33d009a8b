"""How fast is testing? Pictures of the bundled sample to class probabilities, centre crop and ten crops, in one run:

    python -m benchmarks.infer [--size 224] [--batches 1 8 128] [--classes 1000] [--precision fp32|bf16] [--repeats 9]
        [--only WORD ...] [--device auto] [--json]

This repository (what test.py runs: uint8 pictures, mean, crops, net, softmax outputs averaged over views) against the
usual module of benchmarks.step, eager and compiled, contiguous and channels_last, torchvision's alexnet, another net,
and this repository's net in ONNX Runtime, as checkpoints.export writes it (fp32 on a CPU, where its packages are
installed). The peers put a picture's ten crops into one batch; all but ONNX Runtime are given float pictures, mean
subtracted. With --precision bf16 all run under autocast. All take turns in one process, in inference mode, with memory
kept (memory.keep).
"""

import functools
import json

import torch

import memory
import utils
from benchmarks.step import make_net
from benchmarks.timing import add_net_options, add_options, chosen, interleaved, machine, milliseconds, pictures
from checkpoints import export
from data.augment import Augment
from kernels import accelerate
from options import packed_size
from utils import Parser, UserError, run_script, whole

THIS, USUAL, ONNX = "this", "usual module", "ONNX Runtime"
FORMS = {  # net, compiled, channels_last
    THIS: ("fast", False, True),
    f"{THIS}, --kernels off": ("plain", False, True),
    USUAL: ("usual", False, False),
    f"{USUAL}, channels_last": ("usual", False, True),
    f"{USUAL}, torch.compile": ("usual", True, False),
    f"{USUAL}, channels_last, torch.compile": ("usual", True, True),
    "torchvision's alexnet (another net)": ("torchvision", False, True),
    ONNX: ("plain", False, False),
}
PROTOCOLS = {"center": False, "ten-crop": True}


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    device = utils.pick_device(args.device)
    utils.no_tf32()
    nets = {name: make(*form, args, device) for name, form in chosen(FORMS, args.only).items()}
    result = {"size": args.size, "precision": args.precision, **machine(device), "images_per_second": {}}
    for protocol, ten_crop in PROTOCOLS.items():
        for batch in args.batches:
            found = race(nets, batch, ten_crop, args, device)
            result["images_per_second"].setdefault(protocol, {})[str(batch)] = found
    print(json.dumps(result) if args.json else report(result))
    return 0


def make(kind: str, compiled: bool, channels_last: bool, args, device: torch.device):
    """(net, its memory layout, whether it is to be compiled)"""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = make_net(kind, args.size, args.classes).to(device, memory_format=layout).eval()
    if kind == "fast":
        accelerate(net)
    return net, layout, compiled


def race(nets: dict, batch: int, ten_crop: bool, args, device: torch.device) -> dict:
    """Each contender's images a second with their quartiles, or why it can't run."""
    stored = packed_size(args.size)  # the crops lie in the middle, mirrored or not
    floats = pictures(batch, stored).to(device)
    raw = (floats + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
    augment = Augment(args.size, torch.full((stored, stored, 3), 128.0), device=device)
    calls, found = {}, {}
    torch.compiler.reset()  # each shape is compiled for itself; torch gives up after eight of them
    for name, (net, layout, compiled) in nets.items():
        net = torch.compile(net, dynamic=False) if compiled else net
        try:
            if name.startswith(THIS):
                work = ours(net, augment, raw, ten_crop, args.precision)
            elif name == ONNX:
                work = in_onnx_runtime(net, raw, ten_crop, args, device)
            else:
                work = theirs(net, floats.contiguous(memory_format=layout), ten_crop, args)
            work()
            calls[name] = work
        except Exception as error:  # no compiler, not for this dtype: the others go on
            found[name] = {"skipped": f"{type(error).__name__}: {utils.one_line(error)}"}
    times = interleaved(calls, args.repeats, device)
    for name in calls:
        entry = milliseconds(times[name])
        found[name] = {"images_per_second": 1000 * batch / entry["median_ms"], **entry}
    return {name: found[name] for name in nets}


def ours(net, augment: Augment, images: torch.Tensor, ten_crop: bool, precision: str):
    members = [(net, lambda stored: augment.views(stored, ten_crop))]

    @torch.inference_mode()
    def work() -> torch.Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return utils.probabilities(members, images)

    return work


def theirs(net, images: torch.Tensor, ten_crop: bool, args):
    from torchvision.transforms.v2 import functional

    @torch.inference_mode()
    def work() -> torch.Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            if not ten_crop:
                return net(functional.center_crop(images, [args.size])).float().softmax(1)
            crops = functional.ten_crop(images, [args.size])
            return net(torch.cat(crops)).float().softmax(1).view(len(crops), len(images), -1).mean(0)

    return work


def in_onnx_runtime(net, images: torch.Tensor, ten_crop: bool, args, device: torch.device):
    from torchvision.transforms.v2 import functional

    if device.type != "cpu" or args.precision != "fp32":
        raise UserError("in fp32 on a CPU only")
    run, planes = onnx_runner(net, args.size), images.permute(0, 3, 1, 2)

    def work() -> torch.Tensor:
        if not ten_crop:
            crops = [functional.center_crop(planes, [args.size])]
        else:
            crops = functional.ten_crop(planes, [args.size])
        pictures = torch.cat(list(crops)).permute(0, 2, 3, 1).contiguous()
        return torch.from_numpy(run(pictures)).view(len(crops), len(images), -1).mean(0)

    return work


@functools.cache
def onnx_runner(net, size: int):
    about = {"classes": [], "resize": "", "store_size": size, "image_size": size}
    whole_net = export.Whole(net, torch.full((size, size, 3), 128.0), size).eval()
    return export.runner(export.exported(whole_net, about))


def report(result: dict) -> str:
    lines = [f"testing, {result['size']} x {result['size']}, {result['precision']}, {result['device']}, "
             f"{result['threads']} threads, torch {result['torch']}, load {result['load']:.2f}; images/s, quartiles, "
             "and times the fastest form of the usual module"]
    for protocol, batches in result["images_per_second"].items():
        for batch, found in batches.items():
            rates = {name: entry["images_per_second"] for name, entry in found.items() if "skipped" not in entry}
            fastest = max((rate for name, rate in rates.items() if name.startswith(USUAL)), default=None)
            lines.append(f"{protocol}, batches of {batch}:")
            for name, entry in found.items():
                if "skipped" in entry:
                    lines.append(f"  {name:<42}{'-':>8}  skipped: {entry['skipped']}")
                    continue
                slow, quick = (1000 * int(batch) / ms for ms in entry["quartiles_ms"][::-1])
                times = f"{rates[name] / fastest:6.2f}" if fastest else ""
                lines.append(f"  {name:<42}{rates[name]:>8.1f}{f'{slow:.1f}..{quick:.1f}':>20}{times}")
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.infer", description="Time testing against its peers.")
    parser.add_argument("--batches", type=whole(1), nargs="+", default=[1, 8, 128], metavar="N",
                        help="pictures at a time (default: 1 8 128)")
    add_net_options(parser)
    add_options(parser)
    return parser


if __name__ == "__main__":
    memory.keep()
    run_script(main)
