"""Laws of the second look: small candidates and nothing else, real surroundings, a mean with a soft edge."""

import numpy as np
import pytest
import torch

from voxdino.inference.second_look import second_look

TILE = (32, 24)  # looks of 16 x 12


def scene(*boxes, shape=(5, 50, 60), value=4.0, context=1, num_classes=3):
    """Logits with boxes (class, slices, rows, columns) standing out, and an image whose every voxel names its place."""
    logits = torch.zeros(shape[0], num_classes, *shape[1:])
    logits[:, 0] = 6.0
    for index, *place in boxes:
        logits[:, index][tuple(slice(*ends) for ends in place)] = 6.0 + value
    depth = shape[0] + 2 * context
    image = torch.arange(depth * shape[1] * shape[2], dtype=torch.float32).reshape(1, 1, depth, *shape[1:])
    return logits, image


class Recorder:
    """A model that answers with a constant, and remembers its crops."""

    def __init__(self, answer=9.0, context=1, num_classes=3):
        self.answer, self.context, self.num_classes = answer, context, num_classes
        self.crops, self.magnified = [], set()

    def __call__(self, crops, magnify):
        self.crops += list(crops)
        self.magnified.add(magnify)
        return torch.full(
            (len(crops), self.num_classes, crops.shape[2] - 2 * self.context, *crops.shape[3:]), self.answer
        )


SMALL = (1, (2, 3), (20, 23), (30, 32))
LARGE = (2, (1, 4), (5, 40), (4, 26))


def look(logits, image, run, **options):
    return second_look(logits, image, run, magnify=2.0, tile=TILE, **options)


def test_nothing_to_look_at_changes_nothing():
    for boxes in ((), (LARGE,)):
        logits, image = scene(*boxes)
        run = Recorder()
        assert look(logits, image, run) is logits and not run.crops


def test_a_candidate_is_seen_with_its_surroundings_and_context_slices():
    logits, image = scene(SMALL, LARGE)
    run = Recorder()
    look(logits, image, run)
    assert run.magnified == {2.0} and len(run.crops) == 1
    torch.testing.assert_close(run.crops[0], image[0, :, 2:5, 13:29, 25:37])


def test_half_the_second_look_in_its_middle_none_at_its_edge_and_nothing_outside():
    logits, image = scene(SMALL)
    before = logits.clone()
    out = look(logits, image, Recorder())
    torch.testing.assert_close(logits, before)
    torch.testing.assert_close(out[2, :, 19:24, 30:33], (before[2, :, 19:24, 30:33] + 9) / 2)
    changed = (out != before).any(1)
    expected = torch.zeros_like(changed)
    expected[2, 13:29, 25:37] = True
    assert torch.equal(changed, expected)
    row = (out - before)[2, 1, 13:29, 28] / (9 - before[2, 1, 13:29, 28])
    np.testing.assert_allclose(row[:4], np.array([0.125, 0.375, 0.625, 0.875]) / 2, rtol=1e-5)
    np.testing.assert_allclose(row, row.flip(0), rtol=1e-5)


def test_a_model_that_says_the_same_again_changes_nothing():
    logits, image = scene(
        SMALL, (1, (2, 3), (26, 28), (36, 40)), (2, (0, 4), (1, 3), (1, 3)), (1, (4, 5), (48, 50), (58, 60))
    )

    def again(crops, magnify):
        found = []
        for crop in crops:
            place = int(crop[0, 1, 0, 0])
            z, y, x = np.unravel_index(place, image.shape[2:])
            found.append(logits[z - 1, :, y : y + crop.shape[2], x : x + crop.shape[3]][:, None])
        return torch.stack(found)

    torch.testing.assert_close(look(logits, image, again), logits)


def test_small_parts_of_a_class_count_where_another_class_is_large():
    logits, image = scene(LARGE, (1, (2, 3), (20, 23), (10, 12)))
    run = Recorder()
    look(logits, image, run)
    assert len(run.crops) == 1


def test_what_was_not_sure_is_looked_at_too():
    for value, num in ((-1.3, 1), (-1.5, 0)):  # probabilities 0.214 and 0.182 of two classes
        logits, image = scene(SMALL, value=value, num_classes=2)
        run = Recorder(num_classes=2)
        look(logits, image, run)
        assert len(run.crops) == num


def test_regions_are_judged_by_their_own_logit():
    logits = torch.full((2, 2, 50, 60), -5.0)
    logits[0, 0, 20:23, 30:32], logits[1, 1, 5:7, 5:7] = -1.3, 0.0
    run = Recorder(context=0, num_classes=2)
    look(logits, torch.zeros(1, 1, 2, 50, 60), run, regions=True)
    assert len(run.crops) == 2


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_the_slices_of_a_call_and_of_a_batch_do_not_matter(at_once):
    torch.manual_seed(0)
    logits, image = scene(SMALL, (1, (1, 4), (8, 11), (44, 46)), (2, (3, 5), (40, 42), (10, 13)))

    def run(crops, magnify):
        context = crops[:, :, :-2] + crops[:, :, 1:-1] - crops[:, :, 2:]
        return (context / 1000).expand(-1, 3, -1, -1, -1).clone()

    whole = look(logits, image, run, at_once=at_once)
    apart = [look(logits[z : z + 1], image[:, :, z : z + 3], run) for z in range(5)]
    torch.testing.assert_close(whole, torch.cat(apart))


def test_a_slab_is_looked_at_as_a_whole():
    logits, image = scene(SMALL, (1, (3, 4), (21, 24), (31, 33)))  # one component over two slices
    run = Recorder()
    out = look(logits, image, run, whole_slabs=True)
    assert len(run.crops) == 1 and run.crops[0].shape == (1, 7, 16, 12)
    assert (out != logits).any(1).any(2).any(1).all()


def test_neighbours_share_a_look_and_overlapping_looks_stay_between_both_predictions():
    logits, image = scene(SMALL, (2, (2, 3), (21, 23), (33, 34)))
    run = Recorder()
    look(logits, image, run)
    assert len(run.crops) == 1
    logits, image = scene(*((1, (2, 3), (20, 22), (x, x + 2)) for x in range(4, 56, 5)), shape=(3, 30, 60))
    out = look(logits, image, Recorder())
    share = (out - logits) / (9 - logits)
    assert share.min() == 0 and share.max() <= 0.5 + 1e-6


def test_looks_never_cost_more_than_seeing_all_of_the_slice():
    boxes = [(1, (0, 1), (y, y + 1), (x, x + 1)) for y in range(0, 64, 4) for x in range(0, 48, 4)]
    logits, image = scene(*boxes, shape=(1, 64, 48))
    logits[0, 1, 40, 20] += 3.0  # the surest
    run = Recorder()
    look(logits, image, run)
    assert len(run.crops) == 64 * 48 // (16 * 12)
    torch.testing.assert_close(run.crops[0], image[0, :, :, 32:48, 14:26])


def test_at_the_border_of_the_image_a_look_keeps_its_full_weight():
    logits, image = scene((1, (0, 1), (0, 2), (58, 60)), shape=(1, 50, 60))
    run = Recorder()
    out = look(logits, image, run)
    torch.testing.assert_close(run.crops[0], image[0, :, :, 0:16, 48:60])
    torch.testing.assert_close(out[0, :, :2, 58:], (logits[0, :, :2, 58:] + 9) / 2)


def test_shifting_the_scene_shifts_the_result():
    first = look(*scene(SMALL), Recorder())
    moved = look(*scene((1, (2, 3), (23, 26), (35, 37))), Recorder())
    torch.testing.assert_close(first[:, :, 10:35, 22:45], moved[:, :, 13:38, 27:50])


def test_a_slice_smaller_than_a_look_is_seen_whole():
    logits, image = scene((1, (0, 1), (2, 4), (3, 5)), shape=(1, 9, 10))
    run = Recorder()
    look(logits, image, run)
    assert run.crops[0].shape == (1, 3, 9, 10)
