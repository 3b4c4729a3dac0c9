"""The average of weights follows the weights; groups keep their ratio of learning rates."""

import torch
from torch import nn

from voxdino.training.optim import WeightAverage, build_optimizer, set_learning_rate
from voxdino.training.state import trainable


def test_the_average_of_constant_weights_is_those_weights():
    model = nn.Linear(3, 2)
    average = WeightAverage(trainable(model), 0.99)
    for _ in range(5):
        average.update()
    for name, tensor in average.state().items():
        torch.testing.assert_close(tensor, model.get_parameter(name).data)


def test_the_average_lags_behind_a_step_and_reaches_it_in_the_end():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0)
    average = WeightAverage(trainable(model), 0.9)
    model.weight.data.fill_(1)
    average.update()
    first = average.state()["weight"].item()
    assert 0 < first < 1
    for _ in range(200):
        average.update()
    assert abs(average.state()["weight"].item() - 1) < 1e-6


def test_swapping_twice_changes_nothing():
    model = nn.Linear(3, 2)
    average = WeightAverage(trainable(model), 0.9)
    model.weight.data.add_(1)
    live = model.weight.data.clone()
    average.swap()
    assert not torch.equal(model.weight.data, live)
    average.swap()
    assert torch.equal(model.weight.data, live)


def test_a_factor_keeps_the_ratio_of_the_groups():
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight], "lr": 1e-2}, {"params": [model.bias], "lr": 1e-3}]
    optimizer = build_optimizer(groups, betas=(0.9, 0.98))
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.98)
    for factor in (0.5, 0.1):
        set_learning_rate(optimizer, factor)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-4]
