"""recipe.py against the paper's section 5, written out in float64."""

import pytest
import torch
from torch import nn

from model import AlexNet, FReLU
from recipe import Schedule, make_optimizer, set_rate


@pytest.mark.parametrize("recipe", ["2012", "paper"])
def test_the_update_is_the_papers_also_over_drops(recipe):
    """v = 0.9 v - 0.0005 lr w - lr g; w = w + v, with lr inside the velocity, over three drops, to 1e-12. Biases of
    the 2012 code: twice the rate, no decay."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    optimizer = make_optimizer(net, recipe=recipe, lr=0.1, momentum=0.9, weight_decay=0.0005)
    values = {name: p.detach().clone() for name, p in net.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in values.items()}
    lr = 0.1
    for step in range(40):
        if step in (10, 20, 30):
            lr /= 10
            set_rate(optimizer, lr)
        grads = {name: torch.randn_like(p) for name, p in values.items()}
        for name, p in net.named_parameters():
            p.grad = grads[name].clone()
        optimizer.step()
        for name, w in values.items():
            plain = name == "weight" or recipe == "paper"
            rate, decay = (lr, 0.0005) if plain else (2 * lr, 0.0)
            velocity[name] = 0.9 * velocity[name] - decay * rate * w - rate * grads[name]
            values[name] = w + velocity[name]
        for name, p in net.named_parameters():
            torch.testing.assert_close(p.detach(), values[name], rtol=1e-12, atol=1e-12)


def test_every_parameter_is_in_one_group():
    net = AlexNet(10, image_size=64)
    for recipe, sizes in (("2012", [8, 8]), ("paper", [16])):
        groups = make_optimizer(net, recipe=recipe, lr=0.01, momentum=0.9, weight_decay=5e-4).param_groups
        assert [len(group["params"]) for group in groups] == sizes
        assert len({id(p) for group in groups for p in group["params"]}) == 16


def test_a_shared_activation_is_in_its_group_once():
    net = nn.Sequential(FReLU(), nn.Linear(2, 2), FReLU())
    net[2].bias = net[0].bias
    groups = make_optimizer(net, recipe="2012", lr=0.01, momentum=0.9, weight_decay=5e-4).param_groups
    assert [len(group["params"]) for group in groups] == [1, 1, 1]


def rates(errors, patience):
    schedule, out = Schedule(0.01, patience), []
    for epoch, error in enumerate(errors, 1):
        out.append(schedule.lr)
        schedule.update(error, epoch)
        if schedule.finished:
            break
    return [round(lr, 8) for lr in out], schedule


def test_the_rate_drops_three_times_and_the_next_wait_ends_the_run():
    seen, schedule = rates([5] * 100, patience=2)
    assert seen == [0.01] * 3 + [0.001] * 2 + [0.0001] * 2 + [0.00001] * 2
    assert schedule.finished
    assert schedule.drops == 3


def test_only_a_strictly_lower_error_is_an_improvement():
    seen, schedule = rates([9, 8, 8, 7, 7, 7, 6.9, 7], patience=2)
    assert seen == [0.01] * 6 + [0.001] * 2
    assert schedule.best == 6.9
    assert (schedule.waited, schedule.drops, schedule.finished) == (1, 1, False)


def test_the_count_starts_anew_after_a_drop():
    seen, _ = rates([5, 6, 6, 6, 4, 6, 6, 6], patience=3)
    assert seen == [0.01] * 4 + [0.001] * 4


def test_fixed_drops_do_not_ask_for_the_error():
    """More than three, and a drop in the middle of an improvement; nothing ends the run; the best is still known."""
    schedule, seen = Schedule(0.01, patience=1, fixed=[1, 3, 4, 5]), []
    for epoch, error in enumerate((9, 8, 8, 7, 8, 8, 8), 1):
        seen.append(round(schedule.lr, 9))
        schedule.update(error, epoch)
    assert seen == [1e-2, 1e-3, 1e-3, 1e-4, 1e-5, 1e-6, 1e-6]
    assert (schedule.best, schedule.finished) == (7, False)
