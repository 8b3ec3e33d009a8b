"""Weights from elsewhere as a checkpoint that load_model, test.py and train.py --init take:

    python -m checkpoints.convert bvlc_alexnet.caffemodel checkpoints/caffe.pt [--mean imagenet_mean.binaryproto]
    python -m checkpoints.convert torchvision checkpoints/torchvision.pt          torchvision fetches its weights
    python -m checkpoints.convert alexnet-owt-7be5be79.pth checkpoints/torchvision.pt

Caffe's net is AlexNet(columns=2, image_size=227, lrn_k=1, lrn_across=True) with inverted dropout. torchvision's is
another net, the one of Krizhevsky's "One weird trick for parallelizing convolutional neural networks" (2014). Both keep
their weights as they are: checkpoints.new_net makes the nets that fit them. FILE's kind is told by its content, not by
its name; code in it is never run. --help lists the options.
"""

import math
import pickle
import shlex
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

from checkpoints import KEYS, MEAN, caffe_net, check_archive, is_plain, save_checkpoint, torchvision_net
from data.manifest import SHORTER_SIDE, WARPED
from data.trees import ilsvrc_wnids
from utils import Parser, UserError, one_line, run_script, shown

CAFFE_OPTIONS = {"columns": 2, "image_size": 227, "lrn_across": True}
CAFFE_ORDER = (
    "conv1", "norm1", "pool1", "conv2", "norm2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc6", "fc7", "fc8",
)
CAFFE_MEAN = (123.0, 117.0, 104.0)  # red, green, blue: what bvlc_alexnet's users subtract where they have no file


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    out = Path(args.out)
    check_paths(args.file, out, args.mean)
    if args.file == "torchvision" or starts_with(args.file, (b"PK", b"\x80")):  # zip or pickle: torch's two formats
        if args.mean is not None:
            raise UserError("--mean goes with Caffe's weights; torchvision's have a mean of their own")
        state = fetch() if args.file == "torchvision" else read_state(Path(args.file))
        converted = from_torchvision(state, args.file)
    else:
        converted = from_caffe(args.file, args.mean)
    check_finite(converted, args.file)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, converted)
    print(report(converted, out))
    return 0


def check_paths(file: str, out: Path, mean: str | None) -> None:
    if file != "torchvision" and not Path(file).is_file():
        raise UserError(f"{file}: no such file (the word torchvision fetches torchvision's weights)")
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file to write")
    if out.suffix.lower() in (".safetensors", ".onnx"):
        raise UserError(f"{out}: what is written here is a .pt, and is to be called so; python -m checkpoints.export "
                        f"makes a {out.suffix} of it")
    if out.suffix.lower() in (".npy", ".binaryproto", ".caffemodel", ".prototxt"):
        raise UserError(f"{out} has the name of an input file; name a .pt to write, and a mean image by --mean")
    for path in (file, mean):
        if path and Path(path).exists() and out.exists() and out.samefile(path):
            raise UserError(f"{out} is a file to read; name another one to write")


def starts_with(file: str, beginnings: tuple) -> bool:
    with open(file, "rb") as content:
        return content.read(8).startswith(beginnings)


def checkpoint(model: dict, config: dict, mean, resize: str) -> dict:
    """A checkpoint as train.py writes it, of weights that train.py did not train."""
    count = config["num_classes"]
    return {
        "model": model, "config": config, "classes": class_names(count),
        "wnids": list(ilsvrc_wnids()) if count == 1000 else None, "mean": mean, "store_size": 256, "resize": resize,
        "image_size": config["image_size"], "epoch": 0, "step": 0, "best": math.inf,
        "dataset": "imagenet" if count == 1000 else "", "store": "",
    }


def class_names(count: int) -> list[str]:
    """ImageNet's names for 1000 classes, in the order of their wnids, which both nets use; else numbers."""
    if count != 1000:
        return [f"class {n}" for n in range(count)]
    from torchvision.models import AlexNet_Weights

    return list(AlexNet_Weights.IMAGENET1K_V1.meta["categories"])


def check_finite(converted: dict, file: str) -> None:
    for name, tensor in converted["model"].items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{file}: {name} holds numbers that are not finite; the file is damaged")


def check_shape(file: str, name: str, shape: tuple, wanted: tuple) -> None:
    if tuple(shape) != tuple(wanted):
        raise UserError(f"{file}: {name} is {tuple(shape)}, an AlexNet's is {tuple(wanted)}; this is another net")


def report(converted: dict, out: Path) -> str:
    config = converted["config"]
    if config["net"] == "torchvision":
        kind = "torchvision's alexnet, not the paper's net: other widths, no LRN, inverted dropout; kept as it is"
    else:
        kind = f"Caffe's AlexNet: two columns, LRN across them with k = {config['lrn_k']:g}, 227 x 227 pixels"
    test = f"python test.py {shlex.quote(shown(out))} --data STORE"
    return f"{kind}; {config['num_classes']} classes\nin {shown(out)}\ntest it: {test}"


# ---------------------------------------------------------------------------------------------- torchvision


def fetch() -> dict:
    """torchvision's own weights, from its cache or its server."""
    from torchvision.models import AlexNet_Weights

    try:
        return AlexNet_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: the wrong checksum
        raise UserError(f"torchvision could not fetch its weights ({error}); name a file of them instead") from None
    except (EOFError, pickle.UnpicklingError):  # the checksum is that of the download alone
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(AlexNet_Weights.IMAGENET1K_V1.url).name
        raise UserError(f"{cached}, where torchvision keeps its weights, is damaged; remove it") from None


def read_state(path: Path) -> dict:
    """A state_dict, or the one within a checkpoint of torchvision's training script. Runs no code from the file."""
    try:
        # torch warns of pickles that it then refuses; torchvision's training script keeps its arguments as a Namespace
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([Namespace]):
            if zipfile.is_zipfile(path):
                check_archive(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is damaged, or holds code, which is not run") from None
    except Exception as error:  # torch's reader raises nearly anything on damaged files
        raise UserError(f"{path} is damaged, or no file of torch's ({type(error).__name__})") from None
    if isinstance(content, dict) and set(KEYS) <= set(content):
        raise UserError(f"{path} is a checkpoint of this project already")
    for name in ("model", "state_dict"):  # as torchvision's script and others save it
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(map(is_plain, content.values())):
        raise UserError(f"{path} holds no state_dict (names and dense tensors of floating-point numbers)")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}  # DataParallel's prefix


def from_torchvision(state: dict, file: str) -> dict:
    """torchvision's weights as they are. Its net takes pixels of 0..255 minus 255 MEAN here, as this project's do, and
    divides them itself (checkpoints.torchvision_net)."""
    last = state.get("classifier.6.weight")
    count = len(last) if last is not None and last.ndim else 0
    with torch.device("meta"):  # names and shapes only
        net = torchvision_net(max(1, count), 224)
    wanted = net.state_dict()
    if set(state) != set(wanted):
        others = sorted(map(str, set(wanted) - set(state)))[:3] or sorted(map(str, set(state) - set(wanted)))[:3]
        raise UserError(f"{file} is not torchvision's alexnet: {', '.join(others)} missing or unknown")
    for name, tensor in wanted.items():
        check_shape(file, name, state[name].shape, tensor.shape)
    state = {name: tensor.float().clone() for name, tensor in state.items()}
    return checkpoint(state, net.config, (255 * torch.tensor(MEAN)).view(1, 1, 3), SHORTER_SIDE)


# ---------------------------------------------------------------------------------------------- Caffe


def from_caffe(file: str, mean_file: str | None) -> dict:
    """bvlc_alexnet's weights. Caffe's pixels are blue, green, red: conv1's inputs change places. Its dropout is the
    inverted kind, and stays so (checkpoints.caffe_net)."""
    layers = read_layers(file)
    names = [layer.name for layer in layers]
    missing = [name for name in CAFFE_ORDER if name not in names]
    if missing:
        raise UserError(f"{file} is no bvlc_alexnet: it has no layer {missing[0]}")
    if names.index("pool1") < names.index("norm1") and names.index("pool2") < names.index("norm2"):
        raise UserError(f"{file} pools before it normalises: this is CaffeNet, not AlexNet, and is not taken")
    if [name for name in names if name in CAFFE_ORDER] != list(CAFFE_ORDER):
        raise UserError(f"{file} is no bvlc_alexnet: its layers do not come in the order {', '.join(CAFFE_ORDER)}")
    others = [layer.name for layer in layers if layer.blobs and layer.name not in CAFFE_ORDER]
    if others:
        raise UserError(f"{file} is no bvlc_alexnet: it has another layer with weights, {others[0]}")
    all_blobs = {layer.name: layer.blobs for layer in layers}
    count = read_blob(all_blobs["fc8"][1], file, "fc8.bias").size if len(all_blobs["fc8"]) == 2 else 1
    with torch.device("meta"):  # names and shapes only
        wanted = caffe_net({"num_classes": count, **CAFFE_OPTIONS, "lrn_k": norm_k(layers, file)})
    model = {}
    for name, layer in wanted.named_children():
        if not hasattr(layer, "weight"):
            continue
        blobs = all_blobs[name]
        if len(blobs) != 2:
            raise UserError(f"{file}: {name} has {len(blobs)} blobs, not weights and biases; the file is damaged")
        for blob, part in zip(blobs, ("weight", "bias"), strict=True):
            array = read_blob(blob, file, f"{name}.{part}")
            shape = tuple(getattr(layer, part).shape)
            check_shape(file, f"{name}.{part}", (1,) * (len(shape) - array.ndim) + array.shape, shape)
            with np.errstate(over="ignore"):  # too large for float32: infinite, which is refused below
                model[f"{name}.{part}"] = torch.from_numpy(array.astype(np.float32).reshape(shape))
    model["conv1.weight"] = model["conv1.weight"].flip(1).contiguous()
    mean = torch.tensor(CAFFE_MEAN).view(1, 1, 3) if mean_file is None else read_mean(mean_file)
    return checkpoint(model, wanted.config, mean, WARPED)


def norm_k(layers, file: str) -> float:
    """The k of the file's LRN layers (1 where it says nothing); the other numbers have to be the paper's."""
    norms = [layer for layer in layers if layer.name in ("norm1", "norm2")]
    for layer in norms:
        lrn = layer.lrn_param
        if (lrn.local_size, round(lrn.alpha, 9), round(lrn.beta, 6)) != (5, 1e-4, 0.75) or lrn.norm_region:
            raise UserError(f"{file}: {layer.name} is not bvlc_alexnet's LRN (5 channels, alpha 1e-4, beta 0.75)")
    ks = {layer.lrn_param.k for layer in norms} or {1.0}
    if len(ks) > 1 or not 0 < min(ks) < math.inf:
        raise UserError(f"{file}: its LRN layers have k = {' and '.join(map(str, sorted(ks)))}, not one k above 0")
    return ks.pop()


def read_layers(file: str) -> list:
    """The layers of a .caffemodel, of Caffe's old (V1) or new form."""
    net = caffe_message("NetParameter", file)
    layers = list(net.layer) or list(net.layers)
    if not layers:
        raise UserError(f"{file} is neither a file of torch's nor a .caffemodel: it holds no layers")
    return layers


def read_mean(file: str) -> torch.Tensor:
    """A mean image, (256, 256, 3) float32 in red, green, blue, from Caffe's .binaryproto or its .npy, (3, 256, 256)
    in blue, green, red."""
    if not Path(file).is_file():
        raise UserError(f"--mean {file}: no such file")
    if Path(file).suffix == ".npy":
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)  # mapped: no memory for what it only claims
        except Exception as error:  # numpy's reader raises nearly anything on damaged files
            raise UserError(f"--mean {file} cannot be read: {one_line(error)}") from None
        array = array if isinstance(array, np.ndarray) else np.array(0)  # a .npz in disguise
    else:
        array = read_blob(caffe_message("BlobProto", file), file, "the mean")
    if array.shape not in ((3, 256, 256), (1, 3, 256, 256)) or array.dtype.kind not in "fiu":
        raise UserError(f"--mean {file} holds no mean image, 3 x 256 x 256 numbers, but {array.shape} {array.dtype}")
    with np.errstate(over="ignore"):
        mean = array.reshape(3, 256, 256)[::-1].transpose(1, 2, 0).astype(np.float32)
    if not np.isfinite(mean).all():
        raise UserError(f"--mean {file} holds numbers that are not finite")
    return torch.from_numpy(mean)


def read_blob(blob, file: str, what: str) -> np.ndarray:
    """A BlobProto as an array; leading dimensions of 1, which the old form adds, are dropped, down to one."""
    kind, content = ("<f4", blob.data) if blob.data else ("<f8", blob.double_data)
    shape = list(blob.shape.dim) or [blob.num, blob.channels, blob.height, blob.width]
    while len(shape) > 1 and shape[0] == 1:
        shape.pop(0)
    size = math.prod(shape) if len(shape) <= 4 and min(shape) > 0 else 0
    if not content or len(content) != size * np.dtype(kind).itemsize:
        raise UserError(f"{file}: {what} has {len(content)} bytes for a shape of {tuple(shape)[:5]}; it is damaged")
    return np.frombuffer(content, kind).reshape(shape)


def caffe_message(kind: str, file: str):
    """A message of Caffe's from a file, by the field numbers of caffe.proto (BVLC/caffe, src/caffe/proto)."""
    from google.protobuf.message import DecodeError

    message = caffe_classes()[kind]()
    try:
        message.ParseFromString(Path(file).read_bytes())
    except (DecodeError, ValueError, MemoryError):
        raise UserError(f"{file} is damaged, or neither a file of torch's nor one of Caffe's") from None
    return message


# Field: number, type, repeated. `data` is a packed list of floats, which looks like bytes in the file and is read as
# such: numpy takes 38 million numbers at once, protobuf would hand them out one by one.
CAFFE_FIELDS = {
    "BlobShape": {"dim": (1, "int64", True)},
    "BlobProto": {
        "num": (1, "int32", False), "channels": (2, "int32", False), "height": (3, "int32", False),
        "width": (4, "int32", False), "data": (5, "bytes", False), "shape": (7, "BlobShape", False),
        "double_data": (8, "bytes", False),
    },
    "LRNParameter": {
        "local_size": (1, "uint32", False), "alpha": (2, "float", False), "beta": (3, "float", False),
        "norm_region": (4, "int32", False), "k": (5, "float", False),
    },
    "V1LayerParameter": {
        "name": (4, "string", False), "blobs": (6, "BlobProto", True), "lrn_param": (18, "LRNParameter", False),
    },
    "LayerParameter": {
        "name": (1, "string", False), "blobs": (7, "BlobProto", True), "lrn_param": (118, "LRNParameter", False),
    },
    "NetParameter": {
        "name": (1, "string", False), "layers": (2, "V1LayerParameter", True), "layer": (100, "LayerParameter", True),
    },
}
CAFFE_DEFAULTS = {"local_size": "5", "alpha": "1", "beta": "0.75", "k": "1"}


def caffe_classes() -> dict:
    """Message classes for CAFFE_FIELDS."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="caffe_fields.proto", package="caffe", syntax="proto2")
    for message, fields in CAFFE_FIELDS.items():
        entry = file.message_type.add(name=message)
        for name, (number, kind, repeated) in fields.items():
            field = entry.field.add(name=name, number=number, label=3 if repeated else 1)
            if kind in CAFFE_FIELDS:
                field.type, field.type_name = field_type.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                field.type = getattr(field_type, f"TYPE_{kind.upper()}")
            if name in CAFFE_DEFAULTS:
                field.default_value = CAFFE_DEFAULTS[name]
            if kind == "int64":
                field.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{name}")) for name in CAFFE_FIELDS}


def make_parser() -> Parser:
    parser = Parser(prog="python -m checkpoints.convert", description="Caffe's or torchvision's AlexNet weights as a "
                    "checkpoint of this project.")
    parser.add_argument("file", metavar="FILE", help="a .caffemodel, torchvision's alexnet weights, or the word "
                        "torchvision, which fetches them")
    parser.add_argument("out", metavar="OUT.pt", help="the checkpoint to write; one that is there is replaced")
    parser.add_argument("--mean", metavar="FILE",
                        help="Caffe's mean image, .binaryproto or .npy (default: its channel means, 104, 117, 123)")
    return parser


if __name__ == "__main__":
    run_script(main)
