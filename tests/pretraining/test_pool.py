"""The pool: slices as the files hold them, whatever killed the build; what is no image is named; draws are fair."""

import json
import os
import pickle
import re
import signal
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from voxdino.core.errors import ConfigError, DatasetError, PartialError
from voxdino.core.geometry import Grid
from voxdino.core.io import write_label_map, write_volume
from voxdino.core.safe_files import digest_file
from voxdino.core.volume import LabelMap, Volume
from voxdino.preparation.intensity import ChannelScaling
from voxdino.preparation.orientation import slice_geometry, to_slices
from voxdino.pretraining import pool_slices
from voxdino.pretraining.pool import Pool
from voxdino.pretraining.pool_build import build_pool
from voxdino.pretraining.pool_cases import choose_policies, grey_of_grey
from voxdino.pretraining.pool_draws import Deck, shuffled
from voxdino.pretraining.pool_slices import SLICE_FACTS, PoolConfig, choose_slices, measure_slices, turn_slices
from voxdino.pretraining.pool_sources import PoolSource

EVERY = PoolConfig(min_foreground=0.0, max_similarity=None)
THICK = (1.0, 2.0, 5.0)  # mm: cut along z
CUBIC = (1.0, 1.0, 1.0)


def noise(seed, shape):
    return np.random.default_rng(seed).integers(1, 1000, shape).astype(np.int16)


def save_volume(path, array, spacing=THICK):
    """(x, y, z) or (C, x, y, z), on axes that run L, P, S."""
    array = array if array.ndim == 4 else array[None]
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, Volume(array, Grid(array.shape[1:], affine)))
    return path


def save_picture(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def build(tmp_path, *sources, config=EVERY, **settings):
    """The finished pool of folders, called after themselves."""
    named = [
        one if isinstance(one, PoolSource) else PoolSource(name=one.name.partition(".")[0], path=str(one))
        for one in sources
    ]
    build_pool(named, tmp_path / "work", config, num_workers=settings.pop("num_workers", 1), **settings)
    return Pool(pool_below(tmp_path))


def pool_below(root):
    """Where `build` puts the pool of a folder."""
    return root / "work" / "pool"


def partly(tmp_path, *sources, **settings):
    """As build, where cases are set aside: the pool and the message."""
    with pytest.raises(PartialError) as caught:
        build(tmp_path, *sources, **settings)
    return Pool(pool_below(tmp_path)), str(caught.value)


def places_of(pool):
    """{(source, case): [(axis, place), ...]} of all slices."""
    found = {}
    for index in range(len(pool)):
        one = pool.read(index)
        found.setdefault((one.source, one.case), []).append((one.axis, one.place))
    return found


@pytest.fixture
def mixed(tmp_path):
    """A tree of volumes and pictures."""
    for number in range(3):
        save_volume(tmp_path / f"tree/scans/v{number}.nii.gz", noise(number, (9, 11, 4 + number)))
    rng = np.random.default_rng(5)
    save_picture(tmp_path / "tree/colour.png", rng.integers(0, 256, (12, 17, 3)).astype(np.uint8))
    save_picture(tmp_path / "tree/grey.png", rng.integers(0, 256, (8, 9)).astype(np.uint8))
    return tmp_path / "tree"


def test_a_plain_tree_becomes_slices_with_the_values_of_its_files(tmp_path, mixed):
    pool = build(tmp_path, mixed)
    assert pool.sources() == {"tree": {"cases": 5, "slices": 4 + 5 + 6 + 2}}
    assert (pool.num_cases, len(pool)) == (5, 17)
    values = noise(1, (9, 11, 5))
    seen = [pool.read(index, context=1) for index in range(len(pool))]
    ours = [one for one in seen if one.case == "scans_v1.nii.gz".removesuffix(".nii.gz")]
    assert [one.place for one in ours] == [0, 1, 2, 3, 4]
    scaling = next(case for case in pool.cases() if case.id == "scans_v1").scaling[0]
    for one in ours:
        around = np.clip([one.place - 1, one.place, one.place + 1], 0, 4)
        wanted = (np.clip(values[:, :, around].astype(float), scaling.lower, scaling.upper) - scaling.mean) / scaling.sd
        np.testing.assert_allclose(one.image[0], wanted.transpose(2, 1, 0), rtol=1e-4, atol=1e-5)
        assert (one.spacing, one.unit, one.axis, one.is_photo) == ((2.0, 1.0), "mm", "S", False)
        assert one.image.dtype == np.float32 and one.image.flags.writeable
        np.testing.assert_allclose(one.padding, [(scaling.lower - scaling.mean) / scaling.sd], rtol=1e-5)


def test_colour_stays_one_image_and_grey_stored_as_colour_becomes_grey(tmp_path, mixed):
    grey = np.random.default_rng(6).integers(0, 256, (10, 13, 1)).astype(np.uint8)
    save_picture(mixed / "xray.jpg.png", np.repeat(grey, 3, axis=2))
    pool = build(tmp_path, mixed)
    pictures = {one.case: one for one in map(pool.read, range(len(pool))) if one.axis is None}
    assert {name: (one.image.shape, one.is_photo) for name, one in pictures.items()} == {
        "colour": ((3, 1, 12, 17), True),
        "grey": ((1, 1, 8, 9), False),
        "xray.jpg": ((1, 1, 10, 13), False),
    }
    pixels = np.asarray(Image.open(mixed / "colour.png"), dtype=np.float32).transpose(2, 0, 1) / 255
    wanted = (pixels - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array([0.229, 0.224, 0.225])[:, None, None]
    np.testing.assert_allclose(pictures["colour"].image[:, 0], wanted, atol=1e-4)
    assert pictures["colour"].unit == "px"


def test_a_known_layout_gives_its_images_and_never_its_labels(tmp_path):
    root = tmp_path / "nnunet"
    for number in range(2):
        for channel in range(2):
            image = noise(10 * number + channel, (9, 8, 3))
            save_volume(root / f"imagesTr/case_{number}_{channel:04d}.nii.gz", image)
        label = np.zeros((9, 8, 3), np.uint8)
        label[2:5, 2:5, 1] = 1
        grid = Grid(label.shape, np.diag([-1.0, -2.0, 5.0, 1.0]))
        (root / "labelsTr").mkdir(exist_ok=True)
        write_label_map(root / f"labelsTr/case_{number}.nii.gz", LabelMap(label, grid))
    save_volume(root / "imagesTs/late_0000.nii.gz", noise(70, (9, 8, 3)))
    save_volume(root / "imagesTs/late_0001.nii.gz", noise(71, (9, 8, 3)))
    description = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "a": 1},
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    pool = build(tmp_path, root)
    assert {case.id: case.shape for case in pool.cases()} == dict.fromkeys(("case_0", "case_1", "late"), (2, 3, 8, 9))
    assert not pool.read(0).is_photo and pool.read(0).image.shape == (2, 1, 8, 9)
    assert digest_file(root / "labelsTr/case_0.nii.gz") not in set(pool.digests())

    (root / "labelsTr/case_1.nii.gz").unlink()  # no longer the layout: the tree is walked, labels stay out
    pool = build(tmp_path, root)
    assert [case.shape[0] for case in pool.cases()] == [1] * 6
    notes = " ".join(pool.facts.sources[0].notes)
    assert "have no label in labelsTr" in notes and "named like labels were left aside: 1 (labelsTr" in notes


def test_what_is_named_like_labels_or_hidden_or_no_image_is_left_aside(tmp_path):
    labels = ("a_seg.nii.gz", "a_seg2_old.nii.gz", "masks/a.nii.gz", "GT/deep/b.nii.gz")
    for seed, name in enumerate((*labels, "a.nii.gz", "seg_of_2020/segments.nii.gz", "._d.nii.gz")):
        save_volume(tmp_path / "tree" / name, noise(seed, (8, 8, 3)))
    (tmp_path / "tree/readme.txt").write_text("hello")
    (tmp_path / "tree/loop").symlink_to(tmp_path / "tree")
    pool = build(tmp_path, tmp_path / "tree")
    assert [case.id for case in pool.cases()] == ["a", "seg_of_2020_segments"]
    notes = " ".join(pool.facts.sources[0].notes)
    assert "left aside: 4 (" in notes and "1 x .txt" in notes


def test_clashing_and_odd_names_become_case_names_of_their_own(tmp_path):
    for seed, name in enumerate(("a/b.nii.gz", "a_b.nii.gz", "A_B.nii", "x" * 190 + ".nii", "..odd.nii"[1:])):
        save_volume(tmp_path / "tree" / name.replace(".odd", "~odd\n"), noise(seed, (8, 8, 3)))
    pool = build(tmp_path, tmp_path / "tree")
    ids = [case.id for case in pool.cases()]
    assert len({name.casefold() for name in ids}) == 5 and max(map(len, ids)) < 180 and "~odd_" in ids
    assert all(name.isprintable() and "/" not in name for name in ids)


def test_slices_along_every_axis_are_those_that_a_plan_for_that_axis_cuts(tmp_path):
    values = noise(0, (17, 18, 19))
    save_volume(tmp_path / "cube/a.nii", values, CUBIC)
    save_volume(tmp_path / "cube/thick.nii", noise(1, (20, 20, 18)), THICK)
    config = EVERY.model_copy(update={"axes": "all"})
    pool = build(tmp_path, tmp_path / "cube", config=config)
    counts = Counter((one.case, one.axis) for one in map(pool.read, range(len(pool))))
    assert counts == {("a", "S"): 19, ("a", "A"): 18, ("a", "R"): 17, ("thick", "S"): 18}
    grid = Grid(values.shape, np.diag([-1.0, -1.0, 1.0, 1.0]))
    rule = next(case for case in pool.cases() if case.id == "a").scaling[0]
    for index in range(len(pool)):
        one = pool.read(index, context=1)
        if one.case == "a":
            stack = to_slices(values, slice_geometry(grid, one.axis)).astype(float)
            around = np.clip([one.place - 1, one.place, one.place + 1], 0, len(stack) - 1)
            wanted = (np.clip(stack[around], rule.lower, rule.upper) - rule.mean) / rule.sd
            np.testing.assert_allclose(one.image[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stacked", ["S", "A", "R"])
@pytest.mark.parametrize("axis", ["S", "A", "R"])
def test_turned_slices_lie_as_slices_prepared_along_that_axis(stacked, axis):
    values, grid = noise(0, (3, 4, 5)), Grid((3, 4, 5), np.diag([2.0, -1.0, 1.0, 1.0])[[1, 0, 2, 3]])
    order, flips = turn_slices(stacked, axis)
    turned = to_slices(values, slice_geometry(grid, stacked)).transpose(order)
    turned = np.flip(turned, [place for place, flip in enumerate(flips) if flip])
    np.testing.assert_array_equal(turned, to_slices(values, slice_geometry(grid, axis)))


def test_in_plane_spacing_holds_for_every_plane_and_leaves_pictures_alone(tmp_path):
    save_volume(tmp_path / "cube/a.nii", noise(0, (20, 22, 18)), (1.2, 1.0, 1.1))
    save_picture(tmp_path / "cube/p.png", noise(0, (9, 9)).astype(np.uint8))
    config = PoolConfig(axes="all", in_plane_spacing=0.5, min_foreground=0, max_similarity=None)
    pool = build(tmp_path, tmp_path / "cube", config=config)
    mm = {"R": 20 * 1.2, "A": 22 * 1.0, "S": 18 * 1.1}
    sides = {"S": ("A", "R"), "A": ("S", "R"), "R": ("S", "A")}
    for index in range(len(pool)):
        one = pool.read(index)
        if one.axis is None:
            assert one.image.shape == (1, 1, 9, 9)
            continue
        assert one.spacing == pytest.approx((0.5, 0.5), rel=0.02)
        for world, size, spacing in zip(sides[one.axis], one.image.shape[2:], one.spacing, strict=True):
            assert size * spacing == pytest.approx(mm[world])


def test_volumes_of_one_slice_and_of_several_frames(tmp_path):
    save_volume(tmp_path / "odd/one.nii", noise(0, (1, 20, 19)), CUBIC)
    for number in range(3):
        save_volume(tmp_path / f"odd/s{number}.nii", noise(number + 9, (20, 20, 5)), THICK)
    save_volume(tmp_path / "odd/frames.nii", noise(1, (3, 9, 8, 2)))
    save_volume(tmp_path / "odd/film.nii", noise(2, (40, 4, 4, 2)))
    pool, message = partly(tmp_path, tmp_path / "odd")
    assert "film.nii" in message and "40 frames or channels: a time series" in message
    shapes = {one.case: (one.axis, one.image.shape) for one in map(pool.read, range(len(pool)))}
    assert shapes["one"] == ("R", (1, 1, 19, 20))
    assert shapes["frames"] == ("S", (3, 1, 8, 9))


def test_a_bad_file_is_set_aside_and_named_and_the_others_make_the_pool(tmp_path, mixed):
    (mixed / "broken.nii.gz").write_bytes((mixed / "scans/v0.nii.gz").read_bytes()[:80])
    save_volume(mixed / "nan.nii", np.full((8, 8, 3), np.nan, np.float32))
    pool, message = partly(tmp_path, mixed)
    assert "2 cases were set aside" in message and "broken.nii.gz" in message and "nan.nii" in message
    assert pool.num_cases == 5 and len(pool.facts.sources[0].set_aside) == 2
    assert str(tmp_path) not in (pool_below(tmp_path) / "pool.json").read_text()


def test_constant_images_and_what_is_mostly_air_are_not_kept(tmp_path):
    image = np.zeros((10, 10, 6), np.int16)
    image[..., 1] = noise(0, (10, 10))
    image[:2, :2, 3] = noise(1, (2, 2)) + 200
    save_volume(tmp_path / "tree/a.nii", image)
    save_volume(tmp_path / "tree/flat.nii", np.full((8, 8, 3), 7, np.int16))
    loose = build(tmp_path, tmp_path / "tree")
    assert places_of(loose) == {("tree", "a"): [("S", 1), ("S", 3)]}
    assert loose.facts.sources[0].num_empty == 1
    strict = build(tmp_path, tmp_path / "tree", config=EVERY.model_copy(update={"min_foreground": 0.05}))
    assert places_of(strict) == {("tree", "a"): [("S", 1)]}


def test_a_pool_without_any_slice_is_refused_and_a_source_without_one_is_named(tmp_path, mixed):
    save_volume(tmp_path / "flat/flat.nii", np.full((8, 8, 3), 7, np.int16))
    with pytest.raises(DatasetError, match=r"no slice is left of 1 cases.*lower min_foreground"):
        build(tmp_path, tmp_path / "flat")
    with pytest.raises(DatasetError, match="no finished pool"):
        Pool(pool_below(tmp_path))
    pool, message = partly(tmp_path, tmp_path / "flat", mixed)
    assert "no slice was kept of: flat" in message
    assert pool.read(pool.draw(0, 0)).source == "tree"


def test_a_large_picture_is_measured_in_strips_as_it_is_whole(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (3, 1, 97, 65)).astype(np.uint8)
    scaling = tuple(ChannelScaling(source=n, lower=0.0, upper=255.0, mean=0.0, sd=1.0) for n in range(3))
    whole = measure_slices(image, scaling, None, (None,))
    seen = []
    original = pool_slices._in_range
    monkeypatch.setattr(pool_slices, "_BLOCK_VALUES", 10 * 3 * 65)
    monkeypatch.setattr(pool_slices, "_in_range", lambda part, rule: seen.append(part.size) or original(part, rule))
    strips = measure_slices(image, scaling, None, (None,))
    assert max(seen) == 10 * 3 * 65 and sum(seen) == image.size
    assert strips["foreground"] == whole["foreground"] and 0 < whole["foreground"] < 1
    difference = strips["thumbnail"].astype(int) - whole["thumbnail"]
    assert np.abs(difference).max() <= 1 and whole["thumbnail"].std() > 5


def test_neighbours_that_look_alike_are_thinned_to_the_last_one_kept():
    facts = np.zeros(9, SLICE_FACTS)
    facts["axis"], facts["slice"], facts["foreground"] = 1, np.arange(9), 1.0
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 200, (3, 32, 32)).astype(np.uint8)
    facts["thumbnail"] = pattern[[0, 0, 0, 1, 1, 0, 2, 2, 2]]
    facts["thumbnail"][7] += 5  # brighter all over: the same picture
    thinned = choose_slices(facts, EVERY.model_copy(update={"max_similarity": 0.9}))
    assert thinned.tolist() == [[1, 0], [1, 3], [1, 5], [1, 6]]
    assert len(choose_slices(facts, EVERY)) == 9
    facts["foreground"][[0, 3]] = 0.0  # what is not kept is nothing to be like
    assert choose_slices(facts, EVERY.model_copy(update={"max_similarity": 0.9}))[:, 1].tolist() == [1, 4, 5, 6]
    facts["thumbnail"][:] = 9  # constant thumbnails are all alike
    assert choose_slices(facts, EVERY.model_copy(update={"max_similarity": 0.9}))[:, 1].tolist() == [1]
    assert choose_slices(facts[:0], EVERY).shape == (0, 2)


def test_slow_change_is_thinned_evenly_and_never_to_nothing(tmp_path):
    x, y, z = np.meshgrid(np.arange(24), np.arange(24), np.arange(30), indexing="ij")
    image = (500 + 400 * np.sin(x / 4 + z / 9) * np.cos(y / 5)).astype(np.int16)
    save_volume(tmp_path / "tree/a.nii", image)
    counts = []
    for limit in (1.0, 0.99, 0.9, 0.01):
        pool = build(tmp_path, tmp_path / "tree", config=EVERY.model_copy(update={"max_similarity": limit}))
        counts.append(len(pool))
        assert pool.read(0).place == 0
    assert 30 >= counts[0] > counts[1] > counts[2] > counts[3] >= 1


def test_measurements_by_hand():
    image = np.zeros((2, 1, 4, 4), np.int16)
    image[0, 0, :2] = 100
    image[1, 0, :, :2] = 50
    rules = tuple(ChannelScaling(source=n, lower=0, upper=100, mean=0, sd=1) for n in range(2))
    facts = measure_slices(image, rules, None, (None,))
    assert facts["foreground"].tolist() == [0.75]  # above nothing in any channel
    corners = facts["thumbnail"][0][[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.tolist() == [191, 128, 64, 0]  # (1 + 0.5) / 2, 1 / 2, 0.5 / 2, 0 of 255; halves to even


@pytest.mark.parametrize(
    ("names", "modality", "values", "kind"),
    [
        (("CT",), "auto", (-1000, 1500), "ct"),
        (("CT",), "auto", (0, 255), "mr"),  # windowed: no Hounsfield units any more
        (("T1",), "auto", (-1000, 1500), "mr"),
        ((), "auto", (-1000, 1500), "ct"),
        ((), "auto", (-100, 1500), "mr"),
        ((), "auto", (-30000, 30000), "mr"),
        ((), "other", (-1000, 1500), "mr"),
        ((), "ct", (0, 255), "ct"),
    ],
)
def test_ct_is_told_by_its_name_and_its_values(names, modality, values, kind):
    array = np.linspace(*values, 4 * 5 * 6).astype(np.int16).reshape(1, 4, 5, 6)
    (policy,) = choose_policies(Volume(array, Grid.from_spacing((4, 5, 6))), names, modality)
    assert policy.kind == kind
    if kind == "ct":
        air, bone = ((hu - policy.mean) / policy.sd for hu in (policy.lower, policy.upper))
        assert (policy.lower, policy.upper) == (-1000, 1000)
        assert air == pytest.approx(-1.99, abs=0.01) and bone == pytest.approx(2.44, abs=0.01)


def test_a_source_says_how_many_cases_were_taken_for_ct(tmp_path):
    for number, values in enumerate([(-1000, 1500), (0, 255)]):
        array = np.random.default_rng(number).integers(*values, (6, 5, 4)).astype(np.int16)
        save_volume(tmp_path / f"tree/{number}.nii.gz", array)
    for modality, told in (("auto", ["1 of 2 cases are taken for CT"]), ("ct", [])):
        pool = build(tmp_path, PoolSource(name="tree", path=str(tmp_path / "tree"), modality=modality))
        notes = [note for note in pool.facts.sources[0].notes if "taken for CT" in note]
        assert len(notes) == len(told) and all(note.startswith(start) for note, start in zip(notes, told, strict=True))


def test_deep_colour_is_scaled_by_its_own_range_and_channel_files_are_no_photo():
    deep = np.random.default_rng(0).integers(0, 65536, (3, 5, 6)).astype(np.uint16)
    picture = Volume(deep, Grid.from_spacing((5, 6), unit="px"))
    assert [policy.upper for policy in choose_policies(picture, (), "auto")] == [65535.0] * 3
    assert {policy.kind for policy in choose_policies(picture, (), "auto", num_files=3)} == {"mr"}
    assert grey_of_grey(picture) is picture


def test_nothing_is_made_twice_and_other_thresholds_make_only_another_index(tmp_path, mixed):
    source = PoolSource(name="tree", path=str(mixed))
    first = build_pool([source], tmp_path / "work", EVERY, num_workers=1)
    assert (first.num_prepared, first.num_kept, first.num_cases, first.num_slices) == (5, 0, 5, 17)
    pool = Pool(first.folder)
    again = build_pool([source], tmp_path / "work", EVERY, num_workers=1)
    assert (again.num_prepared, again.num_kept, Pool(first.folder).digest()) == (0, 5, pool.digest())
    heavier, thinner = source.model_copy(update={"weight": 2.0}), PoolConfig(max_similarity=0.1)
    for sources, config in (([heavier], EVERY), ([source], thinner)):
        other = build_pool(sources, tmp_path / "work", config, num_workers=1)
        assert other.num_kept == 5 and Pool(first.folder).digest() != pool.digest()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_killed_build_is_no_pool_and_the_same_command_ends_with_the_same_bytes(tmp_path, mixed, stop_after):
    def stop(done, _):
        if done == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, mixed, on_progress=stop)
    folder = pool_below(tmp_path)
    with pytest.raises(DatasetError, match="no finished pool"):
        Pool(folder)
    first = next((folder / "tree/cases").glob("*.json"))
    (folder / "tree/cases/stranger.json").write_text("{}")  # of a case that is no longer there
    first.write_text(first.read_text()[:100])  # a record that says nothing
    resumed = build(tmp_path, mixed)
    whole = build(tmp_path / "other", mixed)
    assert contents(folder) == contents(pool_below(tmp_path / "other"))
    assert resumed.digest() == whole.digest()


def test_builds_killed_at_random_moments_end_with_the_same_bytes(tmp_path, mixed):
    begin = time.monotonic()
    build(tmp_path / "other", mixed)
    usual_s, rng = time.monotonic() - begin, np.random.default_rng(0)
    for delay_s in usual_s * rng.uniform(0.05, 0.9, 5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: the child starts none
            child = os.fork()
        if child == 0:
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, delay_s)
                build(tmp_path, mixed)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    build(tmp_path, mixed)
    assert contents(pool_below(tmp_path)) == contents(pool_below(tmp_path / "other"))


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path, mixed):
    build(tmp_path / "one", mixed, num_workers=1)
    build(tmp_path / "two", mixed, num_workers=2)
    assert contents(pool_below(tmp_path / "one")) == contents(pool_below(tmp_path / "two"))


@pytest.mark.parametrize("damage", ["shorter", "other bytes", "missing", "changed source"])
def test_only_what_was_damaged_or_changed_is_made_again(tmp_path, mixed, damage):
    before = build(tmp_path, mixed).digest()
    image = pool_below(tmp_path) / "tree/cases/scans_v1.image.b2nd"
    data = image.read_bytes()
    if damage == "changed source":
        save_volume(mixed / "scans/v1.nii.gz", noise(77, (9, 11, 5)))
    elif damage == "missing":
        image.unlink()
    else:
        image.write_bytes(data[:-7] if damage == "shorter" else data[:-1] + bytes([data[-1] ^ 1]))
    if damage != "changed source":
        pool = Pool(pool_below(tmp_path))
        with pytest.raises(DatasetError, match=r"scans_v1.*(damaged|no such file).*build the pool again"):
            places_of(pool)
    summary = build_pool([PoolSource(name="tree", path=str(mixed))], tmp_path / "work", EVERY, num_workers=1)
    assert (summary.num_prepared, summary.num_kept) == (1, 4)
    pool = Pool(pool_below(tmp_path))
    assert len(places_of(pool)["tree", "scans_v1"]) == 5
    assert (pool.digest() == before) is (damage != "changed source")


@pytest.mark.parametrize("name", ["index.npy", "cases.jsonl", "places.npy", "digests.npy", "pool.json"])
def test_a_damaged_index_is_never_read(tmp_path, mixed, name):
    build(tmp_path, mixed)
    path = pool_below(tmp_path) / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DatasetError, match=re.escape(name)):
        Pool(pool_below(tmp_path))


def test_images_that_are_there_twice_count_once(tmp_path, mixed):
    (mixed / "copy.nii.gz").write_bytes((mixed / "scans/v0.nii.gz").read_bytes())
    inner = PoolSource(name="inner", path=str(mixed / "scans"))
    pool, message = partly(tmp_path, PoolSource(name="outer", path=str(mixed)), inner)
    assert pool.sources() == {"outer": {"cases": 5, "slices": 17}, "inner": {"cases": 0, "slices": 0}}
    assert [source.num_duplicates for source in pool.facts.sources] == [1, 3]
    assert "no slice was kept of: inner" in message


def test_sources_that_cannot_be_meant_are_refused(tmp_path, mixed):
    def refused(match, *sources, kind=ConfigError):
        with pytest.raises(kind, match=match):
            build(tmp_path, *sources)

    refused("no source")
    refused(
        "'a' and 'b' are one place.*higher weight",
        PoolSource(name="a", path=str(mixed)),
        PoolSource(name="b", path=f"{mixed}/scans/.."),
    )
    other = PoolSource(name="Tree", path=str(mixed / "scans"))
    refused("two sources are called 'Tree'", mixed, other)
    refused("no such file or folder. Did you mean 'tree'", tmp_path / "tre", kind=DatasetError)
    (tmp_path / "empty").mkdir()
    refused("holds no image for the pool", tmp_path / "empty", kind=DatasetError)
    save_volume(tmp_path / "only/labelsTr/a.nii", noise(0, (8, 8, 3)))
    refused("holds no image.*left aside: 1 .labelsTr/a.nii", tmp_path / "only", kind=DatasetError)
    left = PoolSource(name="tree", path=str(mixed), leave_out=("case*",))
    refused("leave_out 'case\\*' matches no case of the pool", left)
    refused("leaves no case", left.model_copy(update={"leave_out": ("*",)}))
    assert not (tmp_path / "work").exists()


def test_cases_can_be_left_out_and_single_files_and_tables_are_sources(tmp_path, mixed):
    table = tmp_path / "table.csv"
    table.write_text("image,label\ntree/grey.png,\n")
    out = PoolSource(name="tree", path=str(mixed), leave_out=("scans_v[12]", "grey"))
    single = PoolSource(name="one", path=str(mixed / "scans/v2.nii.gz"), leave_out=("grey",))  # matches elsewhere
    pool = build(tmp_path, out, single, table)
    assert sorted(name for _, name in places_of(pool)) == ["colour", "grey", "scans_v0", "v2"]


def test_draws_take_every_slice_once_before_any_twice_and_repeat_from_the_seed_alone(tmp_path, mixed):
    pool = build(tmp_path, mixed)
    draws = [pool.draw(number, 3) for number in range(3 * len(pool))]
    for lap in range(3):
        assert sorted(draws[lap * len(pool) : (lap + 1) * len(pool)]) == list(range(len(pool)))
    assert draws[: len(pool)] != draws[len(pool) : 2 * len(pool)] != sorted(draws[: len(pool)])
    again = Pool(pool.folder)
    numbers = np.random.default_rng(0).permutation(len(draws)).tolist()
    assert [again.draw(number, 3) for number in numbers] == [draws[number] for number in numbers]
    assert [pool.draw(number, 4) for number in range(len(pool))] != draws[: len(pool)]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.5), (0.3, 7.0, 1e-3)])
def test_a_slice_is_drawn_as_often_as_its_source_weighs(weights):
    sizes = (30, 7, 100)
    deck = Deck(list(zip(sizes, weights, strict=True)))
    length = deck._edges[-1] if deck._edges[-1] < 20_000 else 20_000
    counts = np.bincount([deck.draw(number, 0) for number in range(length)], minlength=sum(sizes))
    parts = np.split(counts, np.cumsum(sizes)[:-1])
    wanted = np.array(sizes) * weights / np.dot(sizes, weights)
    np.testing.assert_allclose([part.sum() / length for part in parts], wanted, atol=0.01)
    if length < 20_000:  # a whole round
        assert all(part.max() - part.min() <= 1 for part in parts)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_shuffling_is_a_permutation(size):
    for key in ("a", "b"):
        assert sorted(shuffled(place, size, key) for place in range(size)) == list(range(size))


def test_four_million_slices_are_drawn_without_any_list():
    deck = Deck([(4_000_000, 1.0), (0, 5.0), (123_457, 3.0)])
    draws = [deck.draw(number, 0) for number in range(2000)]
    assert max(draws) < 4_123_457 and len(set(draws)) > 1990
    assert np.mean([index < 4_000_000 for index in draws]) == pytest.approx(4e6 / (4e6 + 3 * 123_457), abs=0.03)


def test_a_pool_reads_the_same_from_threads_and_from_other_processes(tmp_path, mixed):
    pool = build(tmp_path, mixed)
    alone = [pool.read(index, context=1).image for index in range(len(pool))]
    copy = pickle.loads(pickle.dumps(pool))
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda index: copy.read(index % len(copy), context=1).image, range(3 * len(copy))))
    for index, image in enumerate(together):
        np.testing.assert_array_equal(image, alone[index % len(alone)])
    sent = pickle.dumps(pool)
    save_picture(mixed / "new.png", noise(3, (9, 9)).astype(np.uint8))
    build(tmp_path, mixed)
    with pytest.raises(DatasetError, match="has changed since it was opened"):
        pickle.loads(sent)
    with pytest.raises(IndexError, match="slice 17 of a pool of 17"):
        pool.read(17)


def test_the_pool_tells_which_cases_it_holds(tmp_path, mixed):
    pool = build(tmp_path, PoolSource(name="tree", path=str(mixed), leave_out=("scans_v2",)))
    files = sorted(path for path in mixed.rglob("*") if path.is_file())
    assert list(pool.digests()) == sorted(digest_file(path) for path in files if path.name != "v2.nii.gz")
