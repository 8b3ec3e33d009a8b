"""train.py's command line: the options, what the data and the device decide of them, and what --resume and --init take
over."""

import math
import os
from argparse import Action, ArgumentTypeError, BooleanOptionalAction, Namespace
from contextlib import suppress
from pathlib import Path

import torch

import checkpoints
from checkpoints import LAYERS
from checkpoints.run import LAST, PREVIOUS, ROOT, RUN_FILES, read_config, refuse_taken
from data import sources
from data.augment import COLOURS
from data.loader import default_workers
from data.manifest import is_store
from data.store import Store
from data.trees import VAL
from kernels import multiplies_bf16
from model import ACTIVATIONS, LRN_ALPHAS, LRN_K, ORDERS, RECIPES, SMALLEST
from utils import Parser, UserError, number, whole

DEFAULTS = {"epochs": 90, "batch_size": 128, "patience": 5, "lr": 0.01}  # but for patience: paper, section 5
SAMPLE_DEFAULTS = {"epochs": 12, "batch_size": 32, "patience": 2}  # 6,000 images: minutes on two CPU cores
INIT_DEFAULTS = {"epochs": 30, "lr": 0.001}  # weights that have learnt already move a tenth as fast
FEW, FEW_BATCH = 2560, 32  # fewer training pictures than 20 batches of 128
# With --resume.
CHANGEABLE = {
    "epochs", "max_steps", "workers", "device", "compile", "download", "checkpoint_minutes", "skip_bad_records", "out",
    "resume",
}
# AlexNet's options, by their names there. --init brings them with it.
NET = (
    "image_size", "columns", "order", "activation", "lrn", "overlapping_pool", "lrn_alpha", "lrn_k", "lrn_across",
)


def parse(argv, interrupted: Path | None = None) -> Namespace:
    """The arguments; with --resume those of the run, but for the few that may change; with --init its net's.
    interrupted: a run's folder that is resumed, whatever argv says of --out and --resume."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("data", "init"):  # whatever the folder in which --resume is called
        setattr(args, name, os.path.realpath(getattr(args, name)) if getattr(args, name) else None)
    args.out = Path(args.out) if args.out else interrupted
    unset = object()  # argparse leaves alone what the namespace has already, unless the option is given
    parsed = vars(parser.parse_args(argv, Namespace(**dict.fromkeys(vars(args), unset))))
    given = {name: getattr(args, name) for name, value in parsed.items() if value is not unset}
    if args.resume or interrupted:
        return resumed(args, {name: value for name, value in given.items() if name != "out"})
    if args.out:
        refuse_taken(args.out)
    if args.init:
        take_over_net(args, given)
    if args.lrn_across and args.columns == 1:
        raise UserError("--lrn-across: one column has no other; add --columns 2")
    useless = [name for name in ("lrn_alpha", "lrn_k", "lrn_across") if name in given]
    if useless and not args.lrn:
        raise UserError(f"{worded(useless[0], given[useless[0]])}: without LRN there is nothing for it to change")
    if args.freeze and not args.init:
        raise UserError(f"--freeze {args.freeze} would freeze untrained weights; add --init CHECKPOINT")
    return args


def resumed(args: Namespace, given: dict) -> Namespace:
    """The arguments of the run in --out, or of the newest one, with those given that may change."""
    folder = args.out
    if folder is None:
        last = checkpoints.newest(LAST, PREVIOUS)
        folder = last.parent if last else checkpoints.FOLDER / "*"
    if not any((folder / name).exists() for name in (LAST, PREVIOUS)):
        start = "choose another --out" if any((folder / name).exists() for name in RUN_FILES) else "start"
        raise UserError(f"nothing to resume: no {folder / LAST}; {start} without --resume")
    config = read_config(folder)
    stored = config["arguments"]
    refuse_changed(stored, folder)
    if stored.get("drops"):
        stored["patience"] = None  # it has none
    packed_from = stored.get("packed_from", {})
    if stored.get("data") and not Path(stored["data"]).exists():
        home = ROOT / str(config.get("store"))
        if is_store(home):  # the whole repository was moved, or copied
            stored["data"] = str(home)
        elif os.path.exists(packed_from.get("data", "")):  # packed anew: settle() looks whether it is the same
            stored |= packed_from
    if given.get("data") and given["data"] not in (stored.get("data"), packed_from.get("data")):
        if not is_store(Path(given["data"])):
            started = before("data", packed_from.get("data", stored["data"]))
            raise UserError(f"--data {given['data']} is no store; {folder} was started {started}")
        stored["data"] = given["data"]  # the store was moved: settle() looks whether it is the same
    if given.get("kernels") == "auto" and stored.get("kernels") == "on":
        stored["kernels"] = "auto"  # the way out where they can't be had here
    for name, value in given.items():
        was = packed_from.get(name, stored.get(name))
        if name not in {*CHANGEABLE, "data"} and value not in (was, stored.get(name), "auto"):
            raise UserError(f"{worded(name, value)}: {folder} was started {before(name, was)}; leave the option out, "
                            "or start a new run")
    changed = {name: value for name, value in given.items() if name in CHANGEABLE}
    return Namespace(**{**vars(args), **stored, **changed, "out": folder, "resume": True})


def refuse_changed(stored: dict, folder: Path) -> None:
    """Raise UserError where config.json's arguments have a value that no command line gives. Options that this version
    does not know are left alone."""
    known = {action.dest: action for action in make_parser()._actions}
    wrong = [name for name in stored if name in known and not could_be_given(known[name], stored[name])]
    if stored.get("init"):  # a net of another kind has no such options
        wrong = [name for name in wrong if name not in NET or stored[name] is not None]
    if not isinstance(stored.get("packed_from", {}), dict):
        wrong.append("packed_from")
    if wrong:
        raise UserError(f"{folder / 'config.json'} was changed, or is damaged: invalid {wrong[0]}")


def could_be_given(action: Action, value) -> bool:
    """Whether a command line can give an option this value."""
    if value is None:
        return action.default is None
    if action.nargs == 0:
        return isinstance(value, bool)
    several, convert = action.nargs == "+", action.type or str
    if isinstance(value, list) != several or value == []:
        return False
    with suppress(ValueError, TypeError, ArgumentTypeError):
        values = value if several else [value]
        return all(convert(str(one)) == one and one in (action.choices or [one]) for one in values)
    return False


def flag(name: str) -> str:
    """The option that sets args.NAME: --no-overlap for overlapping_pool."""
    return next(action.option_strings[0] for action in make_parser()._actions if action.dest == name)


def worded(name: str, value) -> str:
    """An option as it was given: "--columns 2", "--no-lrn"."""
    if value is None or isinstance(value, bool):
        return flag(name)
    return " ".join([flag(name), *map(str, value if isinstance(value, list) else [value])])


def before(name: str, value) -> str:
    """How a run had an option that is given otherwise now: "with --columns 2", "without --no-lrn"."""
    return f"{'without' if value is None or isinstance(value, bool) else 'with'} {worded(name, value)}"


def take_over_net(args: Namespace, given: dict) -> None:
    """Set the options of the net to those of --init's. One that was given has to be the same."""
    config = checkpoints.load_checkpoint(args.init)["config"]
    for name in NET:
        if name in given and given[name] != config.get(name):
            theirs = f"was made {before(name, config[name])}" if name in config else "has no such option"
            raise UserError(f"{worded(name, given[name])}: the net of --init {args.init} {theirs}, and brings its "
                            "options with it; leave this one out")
        setattr(args, name, config.get(name))
    args.dropout = args.dropout and bool(config.get("dropout", True))


def make_parser() -> Parser:
    parser = Parser(prog="train.py", description="Train AlexNet. Defaults are the paper's, with the 2012 code's "
                    "initialisation, learning rate of biases, LRN alpha and colour noise.")
    _add_data(parser.add_argument_group("data"))
    _add_net(parser.add_argument_group("net"))
    _add_training(parser.add_argument_group("training (paper, section 5)"))
    _add_machine(parser.add_argument_group("machine and run"))
    return parser


def _add_data(group) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument("--dataset", choices=sources.NAMED, help="a named set, packed first where it has no store")
    which.add_argument("--data", metavar="STORE",
                       help="a store, or something else that data.pack takes, which is packed first: a folder of "
                       "pictures, FOLDER/CLASS/... or FOLDER/train/CLASS/..., an .h5 file")
    group.add_argument("--val", type=number(0, 1), metavar="FRACTION",
                       help=f"part of the training pictures to set aside for validation, where FOLDER has no val/ "
                       f"(default: {VAL})")
    group.add_argument("--download", choices=("yes", "no"), default="yes", help="may a named set be downloaded?")
    group.add_argument("--image-size", type=whole(63), metavar="N",
                       help="side of the net's input in pixels (default: 64 of 72, 224 of 256)")
    group.add_argument("--mean", choices=("image", "channel"), default="image",
                       help="subtract the mean image (2012 code) or the mean of each channel (default: %(default)s)")
    group.add_argument("--no-mirror", dest="mirror", action="store_false", help="do not flip half of the pictures")
    group.add_argument("--colour", choices=COLOURS, default=COLOURS[0],
                       help="colour noise by standard deviations (2012 code) or eigenvalues (paper, section 4.1) "
                       "(default: %(default)s)")
    group.add_argument("--crop-runs", type=whole(1), default=1, metavar="N",
                       help="pictures in a row that are cropped and mirrored alike; the 2012 code has 32 "
                       "(default: %(default)s)")
    group.add_argument("--balance", action="store_true",
                       help="show each class equally often; an epoch has as many pictures as before")
    group.add_argument("--workers", type=whole(0), metavar="N",
                       help="processes that read a split of more than 1 GB, in all training processes together "
                       "(default: one a core for a GPU; none on a CPU, where the net needs the cores)")


def _add_net(group) -> None:
    group.add_argument("--columns", type=int, choices=(1, 2), default=1,
                       help="2: the paper's two GPUs in one module (default: %(default)s)")
    group.add_argument("--order", choices=ORDERS, default=ORDERS[0],
                       help="of ReLU, LRN and pooling; 2012: as in the authors' source, with its padding and its "
                       "second norm (default: %(default)s)")
    group.add_argument("--activation", choices=tuple(ACTIVATIONS), default="relu",
                       help="tanh: paper, figure 1; frelu is max(x, 0) + b, srelu max(x, b), with a learnable b a "
                       "layer (default: %(default)s)")
    group.add_argument("--no-lrn", dest="lrn", action="store_false", help="leave LRN out (paper, section 3.3)")
    group.add_argument("--lrn-alpha", choices=LRN_ALPHAS, default=LRN_ALPHAS[0],
                       help="2012: divided by the channels summed, paper: as printed (default: %(default)s)")
    group.add_argument("--lrn-k", type=number(0), default=LRN_K, metavar="K",
                       help="Caffe has 1 (default: %(default)s)")
    group.add_argument("--lrn-across", action="store_true", help="LRN's window crosses from column to column (Caffe)")
    group.add_argument("--no-overlap", dest="overlapping_pool", action="store_false",
                       help="pool 2x2, not 3x3 (section 3.4)")
    group.add_argument("--no-dropout", dest="dropout", action="store_false", help="leave dropout out (section 4.2)")


def _add_training(group) -> None:
    group.add_argument("--recipe", choices=RECIPES, default=RECIPES[0],
                       help="2012: standard deviation 0.03 in conv3-5, biases at twice the learning rate and "
                       "without weight decay; paper: 0.01, one learning rate, weight decay on all (default: "
                       "%(default)s)")
    group.add_argument("--init", metavar="CHECKPOINT",
                       help="start from these weights, with the net's options; the last layer starts afresh where the "
                       "classes are others")
    group.add_argument("--freeze", choices=tuple(LAYERS)[:-1], metavar="LAYER",
                       help=f"this layer and all before it keep the weights of --init: {', '.join(tuple(LAYERS)[:-1])}")
    group.add_argument("--epochs", type=whole(1), metavar="N",
                       help="at most (default: 90; with --init 30; sample 12, with --init too)")
    group.add_argument("--batch-size", type=whole(1), metavar="N",
                       help=f"of all processes (default: 128; 32 for the sample and fewer than {FEW:,} pictures)")
    group.add_argument("--lr", type=number(0), metavar="RATE",
                       help="learning rate of the weights (default: 0.01; --init: 0.001)")
    group.add_argument("--momentum", type=number(0, 1, True), default=0.9, metavar="X", help="default: %(default)s")
    group.add_argument("--weight-decay", type=number(0, including=True), default=5e-4, metavar="X",
                       help="default: %(default)s")
    drop = group.add_mutually_exclusive_group()
    drop.add_argument("--patience", type=whole(1), metavar="N",
                      help="epochs without a lower validation error until the learning rate is divided by 10 "
                      "(default: 5; sample: 2)")
    drop.add_argument("--drops", type=whole(1), nargs="+", metavar="EPOCH",
                      help="divide the learning rate by 10 after these epochs instead, for comparisons between runs")
    group.add_argument("--seed", type=whole(0), default=0, metavar="N",
                       help="seed of all random choices (default: %(default)s)")


def _add_machine(group) -> None:
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                       help="auto: bf16 autocast on a GPU that has bf16, fp32 elsewhere; fp32 is without TF32, and "
                       "weights are fp32 always")
    group.add_argument("--kernels", choices=("auto", "on", "off"), default="auto",
                       help="the fast parts of kernels.py; auto: those that agree with model.py on this machine; on: "
                       "stop where LRN, or on a CPU the dense layers, have none; off: model.py alone "
                       "(default: %(default)s)")
    group.add_argument("--compile", action=BooleanOptionalAction, default=False,
                       help="use torch.compile (needs a C++ compiler)")
    group.add_argument("--out", metavar="DIR", help="run folder (default: the next free checkpoints/<dataset>-<n>)")
    group.add_argument("--resume", action="store_true", help="go on with --out, or with the newest run in checkpoints/")
    group.add_argument("--checkpoint-minutes", type=number(0), default=10, metavar="M",
                       help="write last.pt this often within an epoch, and after each (default: %(default)s)")
    group.add_argument("--skip-bad-records", type=whole(0), default=0, metavar="N",
                       help="replace up to N damaged records by others, and report them (default: %(default)s: stop)")
    group.add_argument("--max-steps", type=whole(1), metavar="N", help="stop after N steps from the very start")


def settled_precision(precision: str, device: torch.device) -> str:
    """What "auto" is on this device: bf16 on a GPU that has it, fp32 otherwise."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and multiplies_bf16(device) else "fp32"


def defaults(args, store: Store) -> dict:
    """What is not given: the paper's, or what suits few pictures or weights that are trained already."""
    found = DEFAULTS | (INIT_DEFAULTS if args.init else {})
    if store.counts.get("train", FEW) < FEW:
        found |= {"batch_size": min(FEW_BATCH, store.counts["train"] or 1)}
    return found | (SAMPLE_DEFAULTS if store.name == "sample" else {})


def small_crops(args, store: Store) -> str:
    """A warning where crops are much smaller than the pictures, of which 7/8 across is usual; else ""."""
    if args.resume or 4 * args.image_size >= 3 * store.size:
        return ""
    part = (args.image_size / store.size) ** 2
    return (f"crops of {args.image_size} x {args.image_size} show {part:.0%} of a picture of {store.size} x "
            f"{store.size}; a store of --size {packed_size(args.image_size)} would show most of it")


def packed_size(image_size: int) -> int:
    """The size of the pictures that crops are taken from: as 256 is to 224."""
    return image_size * 8 // 14 * 2


def settle(args, store: Store, device: torch.device, world: int) -> None:
    """Fill in what the store and the device decide, and refuse what does not fit them."""
    if args.resume and read_config(args.out)["fingerprint"] != store.fingerprint:
        raise UserError(f"{store.path} has changed since {args.out} was started, or is another store; name the right "
                        "one with --data, or start a new run")
    for name, value in defaults(args, store).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.drops and not args.resume and max(args.drops) >= args.epochs:
        raise UserError(f"--drops {max(args.drops)}: the run ends after {args.epochs} epochs; raise --epochs")
    if args.drops and len(set(args.drops)) < len(args.drops):
        raise UserError(f"{worded('drops', args.drops)}: an epoch is named twice")
    if args.drops and args.lr * 10.0 ** -len(args.drops) < 1e-20:
        raise UserError(f"--drops: after {len(args.drops)} drops a learning rate of {args.lr:g} is as good as 0")
    chosen_by = "--image-size" if args.image_size else "the smallest net takes"
    if args.image_size is None:
        args.image_size = max(SMALLEST[args.order], math.ceil(store.size * 7 / 64) * 8)  # 7/8: 64 of 72, 224 of 256
    if args.image_size > store.size:
        chosen_by = f"--init {args.init} takes" if args.init else chosen_by
        raise UserError(f"{chosen_by} {args.image_size}: {store.path} has {store.size} x {store.size} pictures; "
                        "pack them again with a larger --size")
    if args.workers is None:
        args.workers = default_workers(device)
    args.precision = settled_precision(args.precision, device)
    for split in ("train", "val"):
        if not store.counts.get(split):
            raise UserError(f"{store.path} has no {split} pictures; pack it again with some")
    if args.batch_size > store.counts["train"]:
        raise UserError(f"--batch-size {args.batch_size}: {store.path} has {store.counts['train']} training pictures")
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} does not divide by {world} processes")
