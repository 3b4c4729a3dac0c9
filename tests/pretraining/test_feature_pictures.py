"""Pictures of patch tokens: one basis for all images, the same file every time."""

import numpy as np
import pytest
import torch
from PIL import Image

from voxdino.models.backbones.vit import ViT, ViTConfig
from voxdino.pretraining.pictures import (
    GAP,
    MARK,
    SIMILARITY_COLOURS,
    draw_pca,
    draw_similarity,
    principal_colours,
    similarity_colours,
)

torch.set_num_threads(1)


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return ViT(ViTConfig(embed_dim=16, depth=1, num_heads=2, patch_size=4, ffn_hidden=16)).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(1))


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_images_and_their_components_lie_side_by_side(vit, images, tmp_path):
    draw_pca(vit, images, tmp_path / "pca.png")
    sheet = read(tmp_path / "pca.png")
    assert sheet.shape == (2 * 12 + GAP, 2 * 20 + GAP, 3)
    assert (sheet[12 : 12 + GAP] == 255).all() and (sheet[:, 20 : 20 + GAP] == 255).all()
    patch = sheet[4:8, 20 + GAP : 24 + GAP]
    assert (patch == patch[0, 0]).all()  # one colour per token


def test_the_same_images_give_the_same_file(vit, images, tmp_path):
    for name in ("a.png", "b.png"):
        draw_pca(vit, images, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_equal_tokens_have_equal_colours_in_all_images():
    tokens = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(2))
    tokens[2, 1, 4] = tokens[0, 0, 1]
    colours = principal_colours(tokens)
    assert colours.shape == (3, 2, 5, 3)
    assert (colours[2, 1, 4] == colours[0, 0, 1]).all()
    assert [int(colours[..., channel].max()) for channel in range(3)] == [255] * 3


def test_the_first_component_is_the_direction_of_most_variance():
    shares = torch.linspace(0, 1, 20)
    tokens = torch.zeros(1, 4, 5, 6)
    tokens[..., 3] = shares.reshape(4, 5)
    colours = principal_colours(tokens)
    assert (np.diff(colours[..., 0].ravel().astype(int)) >= 0).all() and colours[0, 3, 4, 0] == 255
    assert (colours[..., 1:] == 0).all()  # there is no other direction


def test_collapsed_and_narrow_tokens_are_black_not_an_error():
    assert (principal_colours(torch.ones(1, 3, 4, 5)) == 0).all()
    assert principal_colours(torch.randn(1, 3, 4, 2)).shape == (1, 3, 4, 3)


def test_a_token_is_like_itself_and_its_place_is_marked(vit, images, tmp_path):
    draw_similarity(vit, images, [(5, 9), (0, 0)], tmp_path / "similarity.png")
    sheet = read(tmp_path / "similarity.png")
    assert sheet.shape == (2 * 12 + GAP, 3 * 20 + 2 * GAP, 3)
    for top in (0, 12 + GAP):
        assert tuple(sheet[top + 4, 8]) == MARK and tuple(sheet[top, 0]) == MARK
        assert tuple(sheet[top + 6, 20 + GAP + 10]) == SIMILARITY_COLOURS[-1]
        assert tuple(sheet[top, 40 + 2 * GAP]) == SIMILARITY_COLOURS[-1]


def test_colours_of_similarities_go_from_dark_to_bright():
    colours = similarity_colours(torch.tensor([[-1.0, 0.0, 0.25, 0.5, 0.75, 1.0]]))[0]
    assert [tuple(colour) for colour in colours] == [SIMILARITY_COLOURS[0], *SIMILARITY_COLOURS]


def test_grey_planes_and_constant_images_are_drawn(vit, tmp_path):
    draw_pca(vit, torch.zeros(1, 3, 8, 8), tmp_path / "black.png")
    assert (read(tmp_path / "black.png")[:8, :8] == 0).all()
