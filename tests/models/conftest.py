"""Small backbones of both families."""

import warnings

import pytest
import torch

from voxdino.models.backbones.vit import ViT, ViTConfig

torch.set_num_threads(1)


def make_vit(**changes) -> ViT:
    """A seeded DINOv3 ViT of three blocks whose blocks do something (LayerScale and biases are not near zero)."""
    facts = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 4, "ffn_hidden": 40, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        vit = ViT(ViTConfig(**facts))
        with torch.no_grad():
            for name, value in vit.named_parameters():
                if value.ndim > 1:
                    value.copy_(torch.randn_like(value) * 0.2)
                elif "norm" not in name or name.endswith("bias"):
                    value.add_(torch.randn_like(value) * 0.1)
    return vit.eval()


DINOV2 = {"family": "dinov2", "mask_k_bias": False, "num_registers": 0, "norm_eps": 1e-6, "position_grid": (3, 3)}


@pytest.fixture
def vit() -> ViT:
    return make_vit()


@pytest.fixture
def new_vit():
    return make_vit


@pytest.fixture
def dinov2_facts():
    return DINOV2


@pytest.fixture(scope="session")
def timm():
    """The library, where it and a torchvision that fits torch are installed (extra `timm`)."""
    try:
        with warnings.catch_warnings():  # of torchvision, while it is imported
            warnings.simplefilter("ignore")
            import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs the extra `timm` ({error})")
    return timm
