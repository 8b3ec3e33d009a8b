"""Take a trained net elsewhere:

    python -m checkpoints.export checkpoints/photos-1/best.pt photos.onnx
    python -m checkpoints.export checkpoints/photos-1/best.pt photos.safetensors

*ONNX*: the net as a program of its own, for ONNX Runtime and what reads its format. Input "pictures", uint8 RGB of the
net's size, (n, S, S, 3); output "probabilities", (n, classes) float32, of one crop each. The mean is inside; LRN is
ONNX's own operator. The metadata say how a picture becomes the input: resized to store_size by the rule `resize`, the
centre cropped to image_size; `classes` is a list in JSON. The file is run in ONNX Runtime and compared with the net
before it is written.

*safetensors*: weights and mean; what a checkpoint holds besides is JSON in the header. load_model, test.py and --init
read it.

Both need packages that the requirements leave out: pip install -r checkpoints/requirements.txt
"""

import copy
import io
import json
import math
import os
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints import KEYS, build_net, load_checkpoint, needs_package, weights_checksum
from data.augment import Augment
from model import LocalResponseNorm
from utils import Parser, UserError, replacing, run_script, shown

OPSET = 18
ALIKE = 1e-4  # largest difference of probabilities between net and file; rounding causes up to 1e-5
LARGEST = 2**31 - 2**20  # bytes of weights in an .onnx file: protobuf holds 2 GiB, and the graph takes some
CHECKED = 16  # pictures that the file is tried with
LUMA = (19595, 38470, 7471)  # of 65536: how Pillow turns RGB into grey


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    out = Path(args.out)
    writers = {".onnx": to_onnx, ".safetensors": to_safetensors}
    if out.suffix.lower() not in writers:
        raise UserError(f"{out}: the name has to end with {' or '.join(writers)}, which says what is written")
    if out.is_dir() or not Path(os.path.realpath(out)).parent.is_dir():
        raise UserError(f"{out} is a folder; name a file" if out.is_dir() else f"{out.parent}: no such folder")
    checkpoint = load_checkpoint(args.checkpoint)
    content, said = writers[out.suffix.lower()](checkpoint, args.checkpoint)
    with replacing(out) as file:
        file.write(content)
    print(f"{shown(out)}: {len(content) / 1e6:,.0f} MB, {said}")
    return 0


# ---------------------------------------------------------------------------------------------- ONNX


class Whole(nn.Module):
    """A net with what comes before and after it: uint8 RGB pictures (n, S, S, 3) to probabilities (n, classes)."""

    def __init__(self, net: nn.Module, mean: Tensor, image_size: int):
        super().__init__()
        self.net, self.grey = net, mean.shape[2] == 1
        self.register_buffer("mean", Augment(image_size, mean).mean)  # the centre of a mean image, three channels

    def forward(self, pictures: Tensor) -> Tensor:
        pixels = pictures.float()
        if self.grey:
            luma = pixels @ torch.tensor(LUMA, dtype=torch.float32)
            pixels = ((luma + 32768) / 65536).floor().unsqueeze(3)
        return self.net((pixels - self.mean).permute(0, 3, 1, 2)).softmax(1)


class OnnxLRN(nn.Module):
    """A LocalResponseNorm as ONNX's operator of that name, once a column."""

    def __init__(self, plain: LocalResponseNorm):
        super().__init__()
        self.columns = plain.columns
        self.numbers = {"size": plain.size, "alpha": plain.alpha, "beta": plain.beta, "bias": plain.k}

    def forward(self, x: Tensor) -> Tensor:
        columns = [
            torch.onnx.ops.symbolic("LRN", (a,), self.numbers, dtype=a.dtype, shape=a.shape, version=13)
            for a in x.chunk(self.columns, 1)
        ]
        return torch.cat(columns, 1) if self.columns > 1 else columns[0]


def to_onnx(checkpoint: dict, path) -> tuple[bytes, str]:
    """The file's bytes, and what to say of them. Raises UserError where a package is missing, or where the file does
    not do what the net does."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        needs_package(name)
    net = Whole(build_net(checkpoint, path), checkpoint["mean"], checkpoint["image_size"]).eval()
    if (size := sum(tensor.nbytes for tensor in net.state_dict().values())) > LARGEST:
        raise UserError(f"the weights take {size / 1e9:.1f} GB, and an .onnx file holds at most 2; "
                        "write a .safetensors")
    content = exported(net, checkpoint)
    pictures = torch.from_numpy(np.random.default_rng(0).integers(
        0, 256, (CHECKED, checkpoint["image_size"], checkpoint["image_size"], 3), np.uint8
    ))
    pictures[: CHECKED // 2] //= torch.arange(2, 2 + CHECKED // 2)[:, None, None, None]  # darker ones, too
    difference = max(compare(net, content, batch) for batch in (pictures, pictures[:1]))
    if not difference <= ALIKE:
        raise UserError(f"ONNX Runtime's probabilities are {difference:.2g} away from the net's; nothing was written")
    return content, f"checked in ONNX Runtime: probabilities within {difference:.1g} of the net's"


def exported(net: Whole, checkpoint: dict) -> bytes:
    """The file's bytes. checkpoint: its classes, resize, store_size and image_size."""
    net = copy.deepcopy(net)
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LocalResponseNorm):
                setattr(parent, name, OnnxLRN(layer))
    size = checkpoint["image_size"]
    # Two pictures: a batch of one would be taken for a constant.
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        program = torch.onnx.export(
            net, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("pictures")},), opset_version=OPSET,
            input_names=["pictures"], output_names=["probabilities"], verbose=False,
        )
    model = program.model_proto
    _strip(model)
    about = {
        "classes": json.dumps(checkpoint["classes"]), "resize": checkpoint["resize"],
        "store_size": str(checkpoint["store_size"]), "image_size": str(size),
        "input": "uint8 RGB, (n, image_size, image_size, 3)", "output": "probabilities by class, (n, classes) float32",
    }
    for key, value in about.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    return model.SerializeToString()


def _strip(model) -> None:
    """Take out what the exporter notes of this machine: places in its files, by node."""
    graph = model.graph
    del model.metadata_props[:], graph.metadata_props[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    model.doc_string = graph.doc_string = ""


def runner(content: bytes):
    """A function from uint8 pictures (n, S, S, 3), a tensor, to ONNX Runtime's probabilities (n, classes), an array."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else its threads stay busy after a run
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda pictures: session.run(["probabilities"], {"pictures": pictures.numpy()})[0]


def compare(net: Whole, content: bytes, pictures: Tensor) -> float:
    """The largest difference of the file's probabilities from the net's; infinite where another class is first."""
    found = runner(content)(pictures)
    with torch.no_grad():
        right = net(pictures).numpy()
    same = found.shape == right.shape and (found.argmax(1) == right.argmax(1)).all()
    return float(np.abs(found - right).max()) if same else float("inf")


# ---------------------------------------------------------------------------------------------- safetensors


def to_safetensors(checkpoint: dict, path) -> tuple[bytes, str]:
    """The file's bytes, and what to say of them."""
    needs_package("safetensors")
    from safetensors.torch import save

    build_net(checkpoint, path)  # raises where the weights do not fit
    tensors = {name: tensor.clone().contiguous() for name, tensor in checkpoint["model"].items()}
    tensors["mean"] = checkpoint["mean"].contiguous()
    about = {key: checkpoint[key] for key in KEYS if key not in ("model", "mean", "store")}
    if math.isinf(about["best"]):  # a converted net has none, and JSON no infinity
        about["best"] = None
    about["crc32"] = weights_checksum(about, tensors)
    # One entry: safetensors writes several in any order, and the same net would give different files.
    return save(tensors, {"alexnet": json.dumps(about, allow_nan=False)}), "weights and mean"


def make_parser() -> Parser:
    parser = Parser(prog="python -m checkpoints.export", description="Write a trained net for other programs.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="a checkpoint of train.py or checkpoints.convert, or a .safetensors of this script")
    parser.add_argument("out", metavar="OUT", help="OUT.onnx or OUT.safetensors")
    return parser


if __name__ == "__main__":
    run_script(main)
