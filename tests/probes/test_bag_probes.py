"""Probes of bags: poolings by hand, and what attention can find that the mean cannot."""

import pytest
import torch

from voxdino.core.errors import DatasetError, UsageError
from voxdino.models.heads.classifier import ClassificationHead
from voxdino.models.heads.pooling import POOLINGS
from voxdino.probes.class_tokens import accuracy
from voxdino.probes.linear import fit_linear_probe
from voxdino.probes.pooling import fit_bag_probe, stacked

torch.set_num_threads(1)


def needles(number, *, seed, size=12, width=6):
    """Bags of noise; those of class 1 have one instance that says so in channel 1, marked in channel 0."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 2
    bags = torch.randn(number, size, width, generator=generator)
    bags[:, :, 0] = 0
    bags[:, 3, 0] = 6
    bags[:, 3, 1] += 3 * (2 * labels - 1)
    return bags, labels


@pytest.mark.parametrize("name", POOLINGS)
def test_every_pooling_ignores_what_is_not_there_and_the_order_and_learns(name):
    torch.manual_seed(0)
    pool = POOLINGS[name](5)
    for value in pool.parameters():
        torch.nn.init.normal_(value, std=0.5)
    bag = torch.randn(1, 4, 5, requires_grad=True)
    padded = torch.cat((bag, torch.full((1, 3, 5), 99.0)), dim=1)
    present = torch.tensor([[True] * 4 + [False] * 3])
    pooled = pool(padded, present)
    torch.testing.assert_close(pooled, pool(bag, present[:, :4]))
    torch.testing.assert_close(pooled, pool(bag.flip(1), present[:, :4]))
    pooled.square().sum().backward()
    assert all(bool(value.grad.any()) for value in (bag, *pool.parameters()))


@pytest.mark.parametrize("name", [name for name in POOLINGS if name != "max"])
def test_attention_starts_as_the_mean(name):
    bags = torch.randn(3, 4, 5)
    torch.testing.assert_close(POOLINGS[name](5)(bags, torch.ones(3, 4, dtype=torch.bool)), bags.mean(1))


@pytest.mark.parametrize("kind, num_outputs", [("single", 4), ("multi", 4), ("ordinal", 3)])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_head_tells_every_kind_of_label(kind, num_outputs, pooling):
    head = ClassificationHead(embed_dim=6, num_classes=4, kind=kind, pooling=pooling)
    logits = head(torch.randn(5, 3, 6))
    assert logits.shape == (5, num_outputs) and head.probabilities(logits).shape == (5, 4)
    labels = torch.randint(0, 2, (5, 4)) if kind == "multi" else torch.randint(0, 4, (5,))
    head.objective.loss(logits, labels).backward()
    assert bool(head.to_logits.weight.grad.any())


@pytest.mark.parametrize("pooling", ["attention", "abmil"])
def test_attention_finds_the_one_slice_that_tells(pooling):
    train, held, test = (needles(n, seed=seed) for n, seed in ((120, 0), (40, 1), (60, 2)))
    mean = fit_bag_probe(*train, *held, pooling="mean")
    found = fit_bag_probe(*train, *held, pooling=pooling, num_epochs=60, num_members=1)
    assert accuracy(mean.probabilities(test[0]), test[1]) < 0.9
    assert accuracy(found.probabilities(test[0]), test[1]) > 0.95


def test_the_mean_probe_is_the_linear_probe_of_the_means_and_takes_bags_of_any_length():
    bags, labels = needles(40, seed=0)
    cut = [bag[: 4 + index % 5] for index, bag in enumerate(bags)]
    means = torch.stack([bag.mean(0) for bag in cut])
    probe, linear = fit_bag_probe(cut, labels, cut, labels), fit_linear_probe(means, labels, means, labels)
    expected = linear.probabilities(means)
    torch.testing.assert_close(probe.probabilities(cut), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(probe.probabilities(cut[:1]), expected[:1], atol=1e-3, rtol=0)


def test_the_same_seed_gives_the_same_probe_and_no_epoch_is_worse_than_the_start():
    train, held = needles(60, seed=0), needles(30, seed=1)
    one, same = (fit_bag_probe(*train, *held, pooling="abmil", num_epochs=3, seed=4) for _ in range(2))
    assert torch.equal(one.logits(held[0]), same.logits(held[0]))
    start = fit_bag_probe(*train, *held, pooling="mean")
    for head in one.heads:
        alone = torch.nn.functional.cross_entropy(head((held[0] - one.mean) / one.sd), held[1])
        assert alone.item() <= start.linear.held_out[start.linear.strength] + 1e-4


@pytest.mark.parametrize("kind", ["multi", "ordinal"])
def test_bags_may_have_several_labels_or_ordered_ones(kind):
    bags, labels = needles(40, seed=0)
    y = torch.stack((labels, 1 - labels, labels), dim=1) if kind == "multi" else labels + (torch.arange(40) // 20)
    probe = fit_bag_probe(bags, y, bags, y, kind=kind, pooling="attention", num_epochs=2, num_members=2, calibrate=True)
    assert probe.probabilities(bags).shape == (40, 3) and probe.temperature > 0 and len(probe.heads) == 2


def test_bags_without_instances_and_unknown_poolings_are_refused():
    with pytest.raises(DatasetError, match="a bag without instances"):
        stacked([torch.ones(2, 3), torch.ones(0, 3)])
    bags, labels = needles(10, seed=0)
    with pytest.raises(UsageError, match=r"unknown pooling 'attension'\. Did you mean 'attention'"):
        fit_bag_probe(bags, labels, bags, labels, pooling="attension")
