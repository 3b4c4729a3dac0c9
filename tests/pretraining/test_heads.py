"""The projection head: the names of the official checkpoints, directions only, a fresh start."""

import pytest
import torch

from voxdino.pretraining.heads import ProjectionHead


def head(**changes):
    torch.manual_seed(0)
    return ProjectionHead(**{"embed_dim": 6, "num_prototypes": 11, "hidden_dim": 8, "bottleneck_dim": 5, **changes})


def test_keys_and_shapes_are_those_of_the_official_checkpoints():
    shapes = {key: tuple(value.shape) for key, value in head().state_dict().items()}
    mlp = {"mlp.0": (8, 6), "mlp.2": (8, 8), "mlp.4": (5, 8)}
    biases = {f"{key}.bias": shape[:1] for key, shape in mlp.items()}
    assert shapes == {f"{key}.weight": shape for key, shape in mlp.items()} | biases | {"last_layer.weight": (11, 5)}


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_the_mlp_has_so_many_layers(num_layers):
    made = head(num_layers=num_layers)
    biases = [key for key in made.state_dict() if key.endswith("bias")]
    assert biases == [f"mlp.{2 * place}.bias" for place in range(num_layers)]
    assert made(torch.randn(3, 6)).shape == (3, 11)


def test_logits_depend_on_the_direction_of_the_bottleneck_alone():
    made, tokens = head(), torch.randn(4, 6)
    before = made(tokens)
    made.mlp[4].weight.data *= 7  # biases are 0
    torch.testing.assert_close(made(tokens), before)
    assert (before.abs() <= made.last_layer.weight.norm(dim=1) + 1e-6).all()  # a product with a unit vector


def test_it_computes_what_it_says():
    made, tokens = head(), torch.randn(2, 3, 6)
    hidden = tokens
    for place in (0, 2, 4):
        hidden = hidden @ made.mlp[place].weight.T + made.mlp[place].bias
        hidden = torch.nn.functional.gelu(hidden) if place < 4 else hidden / hidden.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(made(tokens), hidden @ made.last_layer.weight.T)


def test_it_starts_from_a_narrow_normal_and_zero_biases_also_without_storage_at_first():
    with torch.device("meta"):
        made = head(embed_dim=64, hidden_dim=128, num_prototypes=256, bottleneck_dim=32)
    made = made.to_empty(device="cpu")
    made.init_weights()
    for name, value in made.named_parameters():
        if name.endswith("bias"):
            assert not value.any()
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.1) and value.mean().abs() < 2e-3


def test_no_masked_patch_gives_no_logits_and_halves_stay_halves():
    assert head()(torch.zeros(0, 6)).shape == (0, 11)
    assert head().bfloat16()(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(head()(torch.randn(2, 6))).all()
