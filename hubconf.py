"""torch.hub entry points: torch.hub.load("PATH OR OWNER/REPOSITORY", "alexnet", ...)."""

from torch import nn

from model import AlexNet

dependencies = ["torch"]


def alexnet(checkpoint: str | None = None, **options) -> nn.Module:
    """AlexNet. Without a checkpoint: freshly initialised, options as for model.AlexNet (num_classes, image_size,
    columns, ...). With a checkpoint: its net and weights in eval mode, with a list `classes`; no options then. (A
    checkpoint converted from torchvision gives torchvision's net.)

    The repository carries no weights. utils.load_model also gives the function that prepares pictures.
    """
    if checkpoint is None:
        return AlexNet(**options)
    if options:
        raise ValueError(f"a checkpoint brings its own options; leave out {', '.join(options)}")
    from utils import load_model  # needs numpy, Pillow and the data package beside torch

    return load_model(checkpoint)[0]
