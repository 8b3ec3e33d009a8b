"""The paper's section 5 as code: the update with momentum and weight decay, and the schedule of the learning rate."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from model import activation_parameters

MAX_DROPS = 3  # the learning rate was "reduced three times prior to termination"


def make_optimizer(net: nn.Module, *, recipe: str, lr: float, momentum: float, weight_decay: float):
    """Stochastic gradient descent for the recipe "2012" or "paper"; set_rate changes its learning rate."""
    groups = parameter_groups(net, recipe, weight_decay)
    for group in groups:
        group["lr"] = lr * group["scale"]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)


def parameter_groups(net: nn.Module, recipe: str, weight_decay: float) -> list[dict]:
    """Recipe 2012: biases have twice the learning rate and no weight decay (2012 code: epsB, wc). Recipe paper: the
    text names one learning rate and one weight decay, so all weights and biases have both. What an activation learns
    has the weights' learning rate and never decays. `scale` times the schedule's learning rate is a group's."""
    learnt, rest = split_off_activations(net)
    weights = [p for name, p in rest.items() if name.endswith("weight")]
    others = [p for name, p in rest.items() if not name.endswith("weight")]
    if recipe == "paper":
        groups = [{"params": weights + others, "scale": 1, "weight_decay": weight_decay}]
    else:
        groups = [
            {"params": weights, "scale": 1, "weight_decay": weight_decay},
            {"params": others, "scale": 2, "weight_decay": 0.0},
        ]
    return groups + [{"params": learnt, "scale": 1, "weight_decay": 0.0}] * bool(learnt)


def split_off_activations(net: nn.Module) -> tuple[list[nn.Parameter], dict[str, nn.Parameter]]:
    """What a net's activations learn, and all its other parameters by name; frozen ones are left out."""
    apart = {id(p): p for p in activation_parameters(net).values() if p.requires_grad}
    rest = {name: p for name, p in net.named_parameters() if p.requires_grad and id(p) not in apart}
    return list(apart.values()), rest


def set_rate(optimizer, lr: float) -> None:
    """Set the learning rate so that the update stays the paper's, v = 0.9 v - 0.0005 lr w - lr g; w = w + v.
    torch's buffer is -v / lr: when lr falls, the buffer has to grow for v to stay what it was."""
    for group in optimizer.param_groups:
        old, group["lr"] = group["lr"], lr * group["scale"]
        if group["lr"] == old:
            continue
        for parameter in group["params"]:
            buffer = optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                buffer.mul_(old / group["lr"])


@dataclass
class Schedule:
    """The paper's learning rate: divided by 10 when the validation error stops improving, three times; the wait
    after that ends the run. Or divided after given epochs, whatever the error.

    fixed: these epochs, counted from 1, or None. best: the lowest validation top-1 error in percent; waited: epochs
    since then or since the last drop.
    """

    lr: float
    patience: int
    fixed: list[int] | None = None
    best: float = math.inf
    waited: int = 0
    drops: int = 0
    finished: bool = False

    def update(self, error: float, epoch: int) -> bool:
        """Take in the validation top-1 error in percent of an epoch (from 1); whether it is the lowest so far."""
        better = error < self.best
        self.best, self.waited = (error, 0) if better else (self.best, self.waited + 1)
        due = epoch in self.fixed if self.fixed else self.waited >= self.patience
        if due:
            self.waited = 0
            if self.drops == MAX_DROPS and not self.fixed:
                self.finished = True
            else:
                self.drops += 1
                self.lr /= 10
        return better
