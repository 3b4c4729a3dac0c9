"""Views: a sample's own business, the region that was drawn, grey stays grey, and each change does what it is named."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from voxdino.core.errors import ImageError, UsageError
from voxdino.pretraining.views import ViewConfig, draw_views, make_views

SMALL = {"global_size": 16, "local_size": 8, "num_locals": 3}
OFF = ViewConfig(
    **SMALL, flips="none", blur=(0.0, 0.0, 0.0), low_resolution=0.0, window=0.0, gamma=0.0, noise=0.0
)  # crops alone
ALL = ViewConfig(
    **SMALL,
    flips="both",
    blur=(1.0, 1.0, 1.0),
    low_resolution=1.0,
    window=1.0,
    gamma=1.0,
    noise=1.0,
)
SIZES = [(40, 31), (23, 64), (16, 16), (50, 44)]


def changed(config, **values):
    return config.model_copy(update=values)


def scan(size=(40, 31), slices=1, seed=0):
    return torch.randn(1, slices, *size, generator=torch.Generator().manual_seed(seed))


def picture(size=(29, 37), seed=0):
    return torch.randn(3, 1, *size, generator=torch.Generator().manual_seed(seed)).clamp(-1.5, 1.5)


def mixed():
    """Scans of several sizes, one with its neighbours, and a photograph."""
    return [scan(SIZES[0]), scan(SIZES[1], slices=3, seed=1), picture(seed=2), scan(SIZES[3], seed=3)]


def views(images, config, seeds=None, photos=None, padding=-2.0):
    return make_views(
        images,
        seeds=list(range(len(images))) if seeds is None else seeds,
        paddings=[padding] * len(images),
        is_photo=[image.shape[0] == 3 for image in images] if photos is None else photos,
        config=config,
    )


def drawn(config, shape=(1, 1, 40, 31), number=200, photo=False):
    return draw_views([shape] * number, seeds=range(number), is_photo=[photo] * number, config=config)


@pytest.mark.parametrize("gram", [{}, {"gram_size": 20}, {"gram_size": 20, "gram_distorted": True}], ids=str)
def test_sizes_and_order_are_as_promised(gram):
    flat = [torch.full((1, 1, *size), float(place)) for place, size in enumerate(SIZES)]
    made = views(flat, changed(OFF, **gram), padding=0.0)
    assert made.globals.shape == (8, 3, 16, 16) and made.locals.shape == (12, 3, 8, 8)
    torch.testing.assert_close(made.globals.mean(dim=(1, 2, 3)), torch.tensor([0.0, 1, 2, 3] * 2))
    torch.testing.assert_close(made.locals.mean(dim=(1, 2, 3)), torch.tensor([0.0, 1, 2, 3] * 3))
    assert (made.gram is None) == (not gram)
    if made.gram is not None:
        assert made.gram.shape == (8, 3, 20, 20)
        torch.testing.assert_close(made.gram.mean(dim=(1, 2, 3)), torch.tensor([0.0, 1, 2, 3] * 2))


def test_a_sample_does_not_depend_on_its_batch():
    images = mixed()
    config = changed(ALL, gram_size=24, photo_colour=1.0)
    together = views(images, config)
    for place, image in enumerate(images):
        alone = views([image], config, seeds=[place])
        assert torch.equal(together.globals[place::4], alone.globals)
        assert torch.equal(together.locals[place::4], alone.locals)
        assert torch.equal(together.gram[place::4], alone.gram)


def test_more_local_crops_leave_the_other_views_as_they_were():
    few, many = views(mixed(), ALL), views(mixed(), changed(ALL, num_locals=5))
    assert torch.equal(few.globals, many.globals) and torch.equal(few.locals, many.locals[:12])
    none = views(mixed(), changed(ALL, num_locals=0))
    assert torch.equal(few.globals, none.globals) and none.locals.shape == (0, 3, 8, 8)


def test_images_are_not_changed_in_place():
    images = mixed()
    before = [image.clone() for image in images]
    views(images, changed(ALL, gram_size=24))
    assert all(torch.equal(*pair) for pair in zip(images, before, strict=True))


@pytest.mark.parametrize("size", [*SIZES, (7, 90), (1, 1), (300, 2)])
def test_boxes_lie_inside_and_have_the_wished_area_and_aspect(size):
    table = drawn(ViewConfig(), (1, 1, *size))
    assert (table["top"] >= 0).all() and (table["top"] + table["height"] <= size[0]).all()
    assert (table["left"] >= 0).all() and (table["left"] + table["width"] <= size[1]).all()
    assert (table["height"] >= 1).all() and (table["width"] >= 1).all()
    if min(size) < 16:
        return
    share = table["height"] * table["width"] / (size[0] * size[1])
    aspect = table["width"] / table["height"]
    slack = 1 / min(table["height"].min(), table["width"].min())  # of rounding to whole pixels
    assert aspect.min() > 0.75 - slack and aspect.max() < 4 / 3 + slack
    assert share.max() <= 1 and share[2:].max() < 0.32 + 0.1 and share[2:].min() > 0.05 - 0.03
    if size[0] == size[1]:  # long ones do not hold a large box of a near-square shape
        assert share[:2].min() > 0.32 - 0.1
        assert share[:2].mean() > 2 * share[2:].mean()


def test_boxes_of_different_views_and_samples_differ():
    table = drawn(ViewConfig(), (1, 1, 400, 300), number=5)
    corners = {tuple(row[name].item() for name in ("top", "left", "height", "width")) for row in table.ravel()}
    assert len(corners) == table.size


@pytest.mark.parametrize("axis, names", [(-2, ("top", "height")), (-1, ("left", "width"))])
def test_a_view_shows_the_region_that_was_drawn(axis, names):
    """On a ramp along one axis every value tells its place."""
    places = torch.arange(40.0)
    ramp = (places[:, None] if axis == -2 else places[None, :]).expand(40, 40)[None, None]
    config = changed(OFF, gram_size=24)
    table = draw_views([ramp.shape], seeds=[5], is_photo=[False], config=config)
    made = views([ramp], config, seeds=[5])
    shown = (*made.globals, *made.locals, *made.gram)
    for view, row in zip(shown, (*table[:, 0], *table[:2, 0]), strict=True):
        first, length = (row[name].item() for name in names)
        number = view.shape[axis]
        expected = first + (torch.arange(number) + 0.5) * length / number - 0.5
        profile = view[0].mean(dim=1 if axis == -2 else 0)
        inner = slice(number // 4, -(number // 4))  # edges lack the pixels beyond
        torch.testing.assert_close(profile[inner], expected[inner], atol=0.1, rtol=0)


def test_shrinking_averages():
    board = (torch.arange(64)[:, None] + torch.arange(64)[None, :]).remainder(2).float()[None, None]
    whole = changed(OFF, global_scale=(1.0, 1.0), aspect=(1.0, 1.0))
    shrunk = views([board], whole, padding=0.0).globals
    torch.testing.assert_close(shrunk, torch.full((2, 3, 16, 16), 0.5), atol=0.02, rtol=0)


def test_no_value_leaves_the_range_of_its_slice():
    edges = torch.zeros(1, 1, 30, 30)
    edges[..., ::7, :] = 1
    for config in (OFF, changed(ALL, noise=0.0)):
        made = views([edges], changed(config, global_size=33), padding=0.0)
        assert made.globals.min() >= 0 and made.globals.max() <= 1 + 1e-6


def test_one_grey_slice_fills_three_equal_planes_and_neighbours_and_colours_one_each():
    made = views(mixed(), OFF)
    scans, others = made.globals[[0, 3, 4, 7]], made.globals[[1, 2, 5, 6]]
    assert torch.equal(scans[:, 0], scans[:, 1]) and torch.equal(scans[:, 0], scans[:, 2])
    assert not torch.equal(others[:, 0], others[:, 1])
    stack = scan(slices=3)
    middle = views([stack[:, 1:2]], OFF)
    torch.testing.assert_close(views([stack], OFF).globals[:, 1], middle.globals[:, 1])
    colours = picture()
    red = views([colours[:1]], OFF, photos=[True])
    torch.testing.assert_close(views([colours], OFF).globals[:, 0], red.globals[:, 0])


def test_all_changes_keep_grey_grey():
    made = views([scan(), scan(SIZES[1])], changed(ALL, photo_colour=1.0, photo_grey=1.0))
    assert torch.equal(made.globals[:, 0], made.globals[:, 2]) and torch.equal(made.locals[:, 0], made.locals[:, 1])


def test_noise_is_the_same_for_colours_and_each_neighbour_has_its_own():
    config = changed(OFF, noise=1.0, noise_sd=(0.5, 0.5))
    flat = [torch.zeros(3, 1, 20, 20), torch.zeros(1, 3, 20, 20)]
    made = views(flat, config, padding=0.0).globals
    assert torch.equal(made[0, 0], made[0, 2]) and not torch.equal(made[1, 0], made[1, 2])
    assert made.std().item() == pytest.approx(0.5, rel=0.1)
    assert not torch.equal(made[0], made[2])  # nor do two views share it


@pytest.mark.parametrize("name", ["low_resolution", "window", "gamma", "noise"])
def test_each_change_changes_the_views(name):
    images = [scan(), scan(SIZES[1], slices=3)]
    config = changed(OFF, **{name: 1.0}, low_resolution_range=(0.5, 0.7))  # nearly 1 would change nothing
    plain, made = views(images, OFF), views(images, config)
    for before, after in ((plain.globals, made.globals), (plain.locals, made.locals)):
        assert torch.isfinite(after).all()
        assert all(not torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", range(3))
def test_blur_has_probabilities_of_its_own_for_the_three_kinds_of_views(kind):
    config = changed(OFF, blur=tuple(float(place == kind) for place in range(3)), blur_sigma_pixels=(1.0, 1.0))
    images = [scan(), scan(SIZES[1])]
    plain, made = views(images, OFF), views(images, config)
    is_changed = [not torch.equal(*pair) for pair in zip(plain.globals, made.globals, strict=True)]
    assert is_changed == [kind == 0] * 2 + [kind == 1] * 2
    assert all(torch.equal(*pair) != (kind == 2) for pair in zip(plain.locals, made.locals, strict=True))


def test_blur_is_gaussian():
    """Parity with a matrix of the kernel; a constant image stays."""
    image = scan((16, 16))
    whole = changed(OFF, global_scale=(1.0, 1.0), aspect=(1.0, 1.0))
    made = views([image], changed(whole, blur=(1.0, 1.0, 1.0), blur_sigma_pixels=(1.0, 1.0)))
    offsets = torch.arange(-3.0, 4.0)
    kernel = torch.exp(-0.5 * offsets**2)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    expected = F.conv2d(F.pad(image, (3, 3, 3, 3), mode="replicate"), kernel[None, None])[0, 0]
    torch.testing.assert_close(made.globals[0, 1], expected, atol=1e-5, rtol=1e-5)


def test_the_window_moves_linearly_and_clips():
    image = scan((16, 16)).clamp(-2, 2)
    whole = changed(OFF, global_scale=(1.0, 1.0), aspect=(1.0, 1.0), window=1.0, window_gain=(1.25, 1.25))
    row = draw_views([image.shape], seeds=[0], is_photo=[False], config=whole)[0, 0]
    expected = (image[0, 0] * 1.25 + row["shift"].item()).clamp(-3, image.max())
    torch.testing.assert_close(views([image], whole, padding=-3.0).globals[0, 0], expected, atol=1e-5, rtol=1e-5)
    assert 0 < abs(row["shift"]) <= 0.25


def test_gamma_keeps_nothing_and_the_largest_value():
    image = scan((16, 16)).clamp(-2, 2)
    image[0, 0, 3, 4], image[0, 0, 5, 6] = -2.5, 3.0
    whole = changed(OFF, global_scale=(1.0, 1.0), aspect=(1.0, 1.0), gamma=1.0, gamma_range=(2.0, 2.0))
    made = views([image], whole, padding=-2.5).globals[0, 0]
    torch.testing.assert_close(made, ((image[0, 0] + 2.5) / 5.5) ** 2 * 5.5 - 2.5, atol=1e-5, rtol=1e-5)


def test_a_constant_slice_stays_finite():
    made = views([torch.full((1, 1, 20, 20), 3.0)], ALL, padding=3.0)
    assert torch.isfinite(made.globals).all() and torch.isfinite(made.locals).all()


def test_scans_are_not_flipped_by_default_and_photographs_are_both_ways():
    assert not drawn(ViewConfig())["flip_rows"].any() and not drawn(ViewConfig())["flip_columns"].any()
    photos = drawn(ViewConfig(), (3, 1, 40, 40), photo=True)
    assert 0.4 < photos["flip_rows"].mean() < 0.6 and 0.4 < photos["flip_columns"].mean() < 0.6
    columns = drawn(ViewConfig(flips="columns"))
    assert columns["flip_columns"].any() and not columns["flip_rows"].any()
    assert not drawn(ViewConfig(flips="none"), (3, 1, 40, 40), photo=True)["flip_columns"].any()


@pytest.mark.parametrize("axis, dim", [("rows", -2), ("columns", -1)])
def test_a_flip_mirrors_along_its_axis(axis, dim):
    images = [scan() for _ in range(8)]
    config = changed(OFF, flips=axis)
    table = draw_views([image.shape for image in images], seeds=range(8), is_photo=[False] * 8, config=config)
    plain, made = views(images, OFF).globals, views(images, config).globals
    flipped = table[:2][f"flip_{axis}"].ravel()
    assert flipped.any() and not flipped.all()
    for before, after, mirrored in zip(plain, made, flipped, strict=True):
        torch.testing.assert_close(after, before.flip(dim) if mirrored else before)


def test_gram_crops_are_clean_but_mirrored_unless_distortion_is_wanted():
    images = mixed()
    strong = changed(ALL, gram_size=32)
    clean = views(images, changed(OFF, flips="both", gram_size=32)).gram
    assert torch.equal(views(images, strong).gram, clean)
    made = views(images, changed(strong, gram_distorted=True))
    assert not torch.equal(made.gram, clean)
    shrunk = F.interpolate(made.gram, size=(16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(made.globals, shrunk)


def test_colour_is_left_alone_by_default_and_only_photographs_have_it():
    colours = [picture(), picture(seed=1)]
    assert not (drawn(ViewConfig(), (3, 1, 40, 40), photo=True)["saturation"] != 1).any()
    plain = views(colours, OFF).globals
    jittered = views(colours, changed(OFF, photo_colour=1.0)).globals
    assert not torch.equal(plain, jittered)
    for_scans = views(colours, changed(OFF, photo_colour=1.0, photo_grey=1.0), photos=[False] * 2)
    assert torch.equal(plain, for_scans.globals)
    grey = views(colours, changed(OFF, photo_grey=1.0)).globals
    sd, mean = torch.tensor([0.229, 0.224, 0.225])[:, None, None], torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    luminance = ((plain * sd + mean).clamp(0, 1) * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1)
    for plane in (grey * sd + mean).unbind(dim=1):
        torch.testing.assert_close(plane, luminance, atol=1e-5, rtol=0)


def test_a_grey_photograph_is_mirrored_and_not_coloured():
    made = views([scan()], changed(OFF, flips="auto", photo_colour=1.0), photos=[True])
    assert torch.equal(made.globals[:, 0], made.globals[:, 2])


@pytest.mark.parametrize("shape", [(2, 1, 20, 20), (1, 5, 20, 20), (3, 3, 20, 20)])
def test_other_channels_and_neighbours_are_refused(shape):
    with pytest.raises(ImageError, match="cannot be shown as three planes"):
        views([torch.zeros(shape)], OFF, photos=[False])


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"gram_size": "100"}, "below global_size"),
        ({"global_scale": "[0.5, 1.2]"}, "global_scale"),
        ({"blur": "[1, 2, 0]"}, "blur"),
        ({"solarise": "0.2"}, "solarise"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        ViewConfig().with_settings(settings)


def test_defaults_are_those_of_the_recipe():
    config = ViewConfig()
    assert (config.global_size, config.local_size, config.num_locals) == (224, 96, 8)
    assert (config.global_scale, config.local_scale, config.blur) == ((0.32, 1.0), (0.05, 0.32), (1.0, 0.1, 0.5))
    assert (config.flips, config.gram_size, config.photo_colour, config.photo_grey) == ("auto", None, 0.0, 0.0)
    assert ViewConfig.from_json(config.to_json()) == config


def test_the_draws_of_the_default_stay_as_they_are():
    """Stored loss curves and resumed runs rely on it."""
    table = drawn(ViewConfig(), number=3)
    numbers = sum(float(table[name].sum()) for name in ("top", "left", "height", "width", "gain", "gamma", "sigma"))
    assert numbers == pytest.approx(1633.1898957021776)
    assert np.array_equal(table, drawn(ViewConfig(), number=3))
