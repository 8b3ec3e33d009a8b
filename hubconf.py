"""torch.hub entry points: torch.hub.load("PATH OR OWNER/REPOSITORY", "alexnet", ...)."""

import sys
from contextlib import contextmanager as _contextmanager  # torch.hub.list lists what has no underscore
from pathlib import Path as _Path

dependencies = ["torch"]
FOLDER = _Path(__file__).resolve().parent
OURS = {"checkpoints", "data", "model", "utils"}
_loaded: dict = {}  # our modules by name, while others of the same names are in their place


def alexnet(checkpoint: str | None = None, **options):
    """AlexNet. Without a checkpoint: freshly initialised, options as for model.AlexNet (num_classes, image_size,
    columns, ...). With a checkpoint: its net and weights in eval mode, with a list `classes`; no options then. (A
    checkpoint converted from torchvision gives torchvision's net.)

    Your program's own modules called model, utils, data, ... stay what they are, so a net cannot be pickled whole
    there: save its state_dict. The repository carries no weights. checkpoints.load_model also gives the function that
    prepares pictures.
    """
    if checkpoint is not None and options:
        raise ValueError(f"a checkpoint brings its own options; leave out {', '.join(options)}")
    with _our_modules():
        if checkpoint is None:
            from model import AlexNet

            return AlexNet(**options)
        from checkpoints import load_model  # needs numpy, Pillow and tqdm as well as torch

        return load_model(checkpoint)[0]


@_contextmanager
def _our_modules():
    """Inside, `import model` and the like give this folder's modules; outside, the caller's program has its own of
    these names, as if nothing had been."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in OURS}
    for name, module in before.items():
        if not (getattr(module, "__file__", None) or "").startswith(f"{FOLDER}/"):
            del sys.modules[name]
    for name, module in _loaded.items():
        sys.modules.setdefault(name, module)
    sys.path.insert(0, str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            if sys.modules[name] is not before.get(name):
                _loaded[name] = sys.modules.pop(name)
        sys.modules.update(before)
