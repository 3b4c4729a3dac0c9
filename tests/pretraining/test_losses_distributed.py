"""Two processes that share a batch lose, and learn, what one process with the whole batch does."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from voxdino.pretraining.losses import dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp

NUM_IMAGES, NUM_PROTOTYPES, EMBED = 4, 5, 3
UNEVEN = {"unequal": ((0, 2), (2, 10)), "empty": ((0, 0), (0, 10)), "equal": ((0, 5), (5, 10))}  # rows of each process


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def share(number, rank, size):
    """The images of a process."""
    return slice(rank * number // size, (rank + 1) * number // size)


def sinkhorn(rank, size, group, layout):
    """The targets of the rows of a process."""
    first, last = UNEVEN[layout][rank] if size == 2 else (0, 10)
    return sinkhorn_knopp(numbers(10, NUM_PROTOTYPES, seed=1)[first:last], temperature=0.07, group=group)


def learn(name, rank, size, group):
    """Loss of one step, and the gradient of the weights under it as DistributedDataParallel averages it."""
    weights = numbers(EMBED, NUM_PROTOTYPES, seed=2).requires_grad_()
    loss = LOSSES[name](weights, rank, size, group)
    loss.backward()
    told = torch.cat((loss.detach().reshape(1), weights.grad.flatten()))
    if group is not None:
        dist.all_reduce(told, group=group)
    return told / size


def dino(weights, rank, size, group):
    mine = share(NUM_IMAGES, rank, size)
    student = numbers(2, NUM_IMAGES, EMBED, seed=3)[:, mine] @ weights
    teacher = numbers(2, NUM_IMAGES, NUM_PROTOTYPES, seed=4)[:, mine]
    targets = sinkhorn_knopp(teacher.flatten(0, 1), temperature=0.07, group=group).unflatten(0, (2, -1))
    return dino_loss(student, targets, ignore_diagonal=True)


def ibot(weights, rank, size, group):
    """The rows of images 0 and 1 for the first process, of 2 and 3 for the second; here 3 and 7 of them."""
    counts = torch.tensor([1, 2, 4, 3])
    owner = torch.arange(NUM_IMAGES).repeat_interleave(counts)
    mine = share(NUM_IMAGES, rank, size)
    rows = (owner >= mine.start) & (owner < mine.stop)
    targets = sinkhorn_knopp(numbers(10, NUM_PROTOTYPES, seed=5)[rows], temperature=0.07, group=group)
    student = numbers(10, EMBED, seed=6)[rows] @ weights
    return ibot_loss(student, targets, weights=(1 / counts)[owner[rows]], num_images=mine.stop - mine.start)


def koleo(weights, rank, size, group):
    mine = share(6, rank, size)
    return koleo_loss(numbers(6, EMBED, seed=7)[mine] @ weights, group=group)


LOSSES = {"dino": dino, "ibot": ibot, "koleo": koleo}


def compute(rank, size, group):
    """Everything, by name."""
    found = {f"sinkhorn {layout}": sinkhorn(rank, size, group, layout) for layout in UNEVEN}
    return found | {name: learn(name, rank, size, group) for name in LOSSES}


def work(rank, folder):
    """A process of the two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = compute(rank, 2, dist.group.WORLD)
    found["koleo alone"] = koleo_loss(numbers(6, EMBED, seed=7)[share(6, rank, 2)])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("layout", UNEVEN)
def test_targets_are_those_of_all_rows_in_one_process(found, layout):
    alone = sinkhorn(0, 1, None, "equal")
    together = torch.cat([one[f"sinkhorn {layout}"] for one in found])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_one_process(found, name):
    alone = learn(name, 0, 1, None)
    assert alone[0] != 0 and alone[1:].any()
    for one in found:
        torch.testing.assert_close(one[name], alone, atol=1e-6, rtol=1e-5)


def test_without_a_group_a_process_counts_alone_though_others_exist(found):
    for rank, one in enumerate(found):
        torch.testing.assert_close(one["koleo alone"], koleo_loss(numbers(6, EMBED, seed=7)[share(6, rank, 2)]))


def test_the_neighbours_of_these_features_lie_across_the_processes():
    """Else the test of KoLeo would not see a missing gradient."""
    features = numbers(6, EMBED, seed=7) @ numbers(EMBED, NUM_PROTOTYPES, seed=2)
    unit = torch.nn.functional.normalize(features, dim=-1)
    nearest = (unit @ unit.T).fill_diagonal_(-math.inf).argmax(dim=1)
    assert ((nearest >= 3) != (torch.arange(6) >= 3)).any()
