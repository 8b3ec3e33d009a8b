"""The net that a run starts from: train.py's options, initialised from --seed or with the weights of --init."""

import torch

import utils
from data import UserError
from data.store import Store
from model import LRN_K, AlexNet

# train.py's options of the net, and their defaults: torchvision's net has none of them.
NET_OPTIONS = {
    "columns": 1, "order": "paper", "activation": "relu", "lrn": True, "overlap": True, "dropout": True,
    "lrn_alpha": "2012", "lrn_k": LRN_K, "lrn_across": False,
}


def starting_net(args, store: Store) -> torch.nn.Module:
    """The net, initialised from --seed or from --init: AlexNet, but where --init was converted from torchvision."""
    # On --resume the file of --init may be gone; last.pt tells as well which net it was.
    other = utils.load_checkpoint(args.out / "last.pt" if args.resume else args.init) if args.init else None
    if other and "network" in other["config"]:
        raise UserError(f"--init {args.init} is no AlexNet but a {other['config']['network']} of studies/networks.py")
    if other and "net" in other["config"]:
        return start_from_torchvision(args, store, other)
    try:
        net = AlexNet(
            len(store.classes), image_size=args.image_size, columns=args.columns, order=args.order,
            activation=args.activation, lrn=args.lrn, overlapping_pool=args.overlap, dropout=0.5 if args.dropout else 0,
            lrn_alpha=args.lrn_alpha, lrn_k=args.lrn_k, lrn_across=args.lrn_across,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    utils.seed_all(args.seed)
    net.init_weights(args.recipe)
    if other and not args.resume:
        check_options(net, other, args.init)
        take_weights(net, other, args.init)
    return net


def check_options(net: AlexNet, other: dict, path: str) -> None:
    """Refuse weights of a net with other options, and say which options they need."""
    older = {name: NET_OPTIONS[name] for name in ("lrn_alpha", "lrn_k", "lrn_across")}  # checkpoints may lack these
    theirs, needed = older | other["config"], []
    for option, value in net.config.items():
        if option not in ("num_classes", "dropout") and theirs.get(option) != value:
            flag = {"lrn": "no-lrn", "overlapping_pool": "no-overlap"}.get(option, option.replace("_", "-"))
            needed.append(f"{option} is {theirs.get(option)}, here {value} (see --{flag})")
    if needed:
        raise UserError(f"--init {path} is a net of other options: {'; '.join(needed)}")


def start_from_torchvision(args, store: Store, other: dict) -> torch.nn.Module:
    """torchvision's alexnet with the weights of a converted checkpoint: another net than the paper's."""
    given = [name for name, value in NET_OPTIONS.items() if getattr(args, name) != value]
    if given:
        raise UserError(f"--init {args.init} is torchvision's net, which has no option {given[0]}")
    if args.image_size != other["config"].get("image_size"):
        raise UserError(f"--init {args.init}: its image_size is {other['config'].get('image_size')}, this run's "
                        f"{args.image_size}")
    utils.seed_all(args.seed)
    try:
        net = utils.torchvision_net(other["config"] | {"num_classes": len(store.classes)})
    except ValueError as error:
        raise UserError(f"--init {args.init}: {error}") from None
    if not args.resume:
        take_weights(net, other, args.init)
    return net


def take_weights(net: torch.nn.Module, other: dict, path: str) -> None:
    """Start from a checkpoint's weights; where the class counts differ the last layer stays as initialised."""
    weights = dict(other["model"])
    if other["config"]["num_classes"] != net.config["num_classes"]:
        last = "classifier.6" if "net" in net.config else "fc8"
        print(f"{path} has {len(other['classes'])} classes, this net {net.config['num_classes']}: {last} starts fresh")
        weights |= {name: value for name, value in net.state_dict().items() if name.startswith(last + ".")}
    try:
        net.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"--init {path}: the weights do not fit: {utils.one_line(error)}") from None
