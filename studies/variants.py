"""Two nets that train.py has no options for. studies.published trains them as rows of its own, with train.py's options,
loop and run folder:

    half        half of the kernels in conv1 to conv4, in one column: the net that the paper holds its two GPUs against
                (section 3.2). conv5 and the dense layers keep theirs, as its footnote says, so that both nets have
                nearly the same number of parameters
    no-masks    no dropout, but the outputs of fc6 and fc7 halved, as the paper's dropout does on average (section 4.2):
                leaving out dropout alone doubles the signal, too; on CIFAR-10 such nets guess for 12 epochs and more
"""

from pathlib import Path

import torch
from torch import Tensor, nn

import options
import processes
import train
import utils
from checkpoints import load_checkpoint
from checkpoints.run import load_last, run_folder
from data.augment import Augment
from data.loader import Loader, machine_errors
from data.store import Store
from kernels import accelerate
from model import AlexNet
from utils import UserError
from watch import Watch

KERNELS = {"conv1": (3, 48), "conv2": (48, 128), "conv3": (128, 192), "conv4": (192, 192), "conv5": (192, 256)}


class Halved(nn.Module):
    """Half of x, in training and testing alike."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def build(variant: str, num_classes: int, image_size: int, recipe: str = "2012", seed: int = 0) -> AlexNet:
    """The net with the first weights of that seed, which are train.py's own for "no-masks". For 1000 classes of 224
    pixels "half" has 59,798,312 parameters."""
    net = AlexNet(num_classes, image_size=image_size)
    if variant == "half":
        for name, (channels, kernels) in KERNELS.items():
            whole = net.get_submodule(name)
            setattr(net, name, nn.Conv2d(channels, kernels, whole.kernel_size, whole.stride, whole.padding))
    else:
        net.drop6, net.drop7 = Halved(), Halved()
    utils.seed_all(seed)
    net.init_weights(recipe)
    net.config["net"] = variant  # so that its checkpoints are not taken for AlexNet's
    return net


@machine_errors()
def main(variant: str, argv) -> int:
    """Train it; train.py's command line and exit status."""
    args = options.parse(argv)
    plain = options.make_parser().parse_args([])
    others = [name for name in (*options.NET, "dropout") if name != "image_size" and
              getattr(args, name) != getattr(plain, name)]
    if others or args.init:
        raise UserError(f"{options.flag(others[0] if others else 'init')}: this net has no such option")
    if processes.number_of_processes() > 1:
        raise UserError("this net trains in one process; start it without torchrun")
    device = utils.pick_device(args.device)
    watch = Watch(device)
    store, _ = train.open_store(args, watch)
    options.settle(args, store, device, world=1)
    watch.warn(options.small_crops(args, store))
    args.network = variant  # for its page
    net = build(variant, len(store.classes), args.image_size, args.recipe, args.seed)
    run = train.set_up(args, store, net, watch)
    if args.resume:
        watch.warn(load_last(run, device))
    print(f"{variant}: {sum(p.numel() for p in net.parameters()):,} parameters; {run.kernels}", flush=True)
    with run_folder(run, device, 0, 1) as warning, watch:
        watch.warn(warning)
        return train.fit(run, watch)


def errors(path: Path, store: Store, *, ten_crop: bool, device) -> dict:
    """The top-1 error in percent on the test pictures, as test.errors gives it."""
    checkpoint = load_checkpoint(path, device)
    net = build(checkpoint["config"]["net"], len(store.classes), checkpoint["image_size"])
    net = net.to(device, memory_format=torch.channels_last).eval()
    net.load_state_dict(checkpoint["model"])
    accelerate(net)
    augment = Augment(checkpoint["image_size"], checkpoint["mean"], device=device)
    loader = Loader(store, "test", device)
    sums = utils.evaluate([(net, lambda images: augment.views(images, ten_crop))], loader.in_order(128))
    return {"top1_error": 100 * sums[1].item() / len(loader)}
