"""Named settings: each a function that returns a FinetuneConfig. Its docstring says what it is and when to take it.

Where a paper and its release disagree, the paper's idea is the default and the docstring says what differs. All recipes
share what the releases lack: validation cases (not test cases) choose the weights, which are running averages; a frozen
backbone is frozen; rates fall over the run.
"""

from collections.abc import Callable

from voxdino.data.augment import NNUNET_2D, AugmentConfig
from voxdino.finetuning.config import FinetuneConfig


def segdino_v2() -> FinetuneConfig:
    """SegDINO v2, frozen: four taps, token pyramid (TPA), scale-aware decoder (SAD). arXiv 2606.17972.

    Take it first: it learns in minutes, because a frozen backbone's features are computed once and cached.
    Differences from the authors' release: the backbone is frozen for real (the release never calls its
    `lock_backbone`), Dice + cross-entropy (there: binary cross-entropy), rate 2e-3 on a cosine (there: 1e-4, constant),
    taps of a ViT-L at blocks 5, 11, 17, 23 (there 4, 11, 17, 23: `--set 'taps=[4,11,17,23]'`).
    """
    return FinetuneConfig(recipe="segdino_v2", learning_rate=2e-3)


def segdino_v2_lora() -> FinetuneConfig:
    """SegDINO v2 with LoRA (rank 16) in every block of the backbone.

    Take it when the frozen recipe levels off and there is time: every step runs the whole backbone forward and
    backward, some five times the work, and pays most where images look least like photographs (CT, MR, ultrasound).
    Batches are small, because for a given time more steps teach more than larger ones. Not in the paper; rank and
    targets as in DINO-Med3D stage 2 (arXiv 2606.18886).
    """
    return FinetuneConfig(
        recipe="segdino_v2_lora", adaptation="lora", learning_rate=1e-3, backbone_lr_scale=1.0, batch_size=8
    )


def segdino_v2_full() -> FinetuneConfig:
    """SegDINO v2 as released: the whole backbone trains, batches of 4, rate 1e-4. arXiv 2606.17972.

    Take it on a GPU with some thousand images. The release also stretches positions at random while training (its
    backbone is in training mode): `--set rope_rescale=2`. Its loss is binary cross-entropy and its rate constant: here
    Dice + cross-entropy and a cosine, as in all recipes (`--set loss=ce`, `--set schedule=constant`).
    """
    return FinetuneConfig(
        recipe="segdino_v2_full",
        adaptation="full",
        decoder_width=256,
        learning_rate=1e-4,
        backbone_lr_scale=1.0,
        batch_size=4,
        augment=AugmentConfig(rotation_degrees=15.0, scale=(1.0, 1.0), translation=0.0),
    )


def segdino_v1() -> FinetuneConfig:
    """SegDINO v1, frozen: four taps brought to one grid and joined. arXiv 2509.00833.

    Take it to compare with the paper; v2 is better at small structures. The head is the paper's, 2.21 M weights; the
    release adds a transposed convolution to the first tap (its `head_form` among the decoder_settings). Dice +
    cross-entropy at 1e-3 (paper: cross-entropy at 1e-4), because a frozen backbone leaves little to spoil.
    """
    return FinetuneConfig(
        recipe="segdino_v1", decoder="segdino_v1", decoder_width=128, learning_rate=1e-3, weight_decay=1e-4
    )


def meddinov3() -> FinetuneConfig:
    """MedDINOv3: the whole ViT trains, tokens of four depths joined, Primus-type decoder. arXiv 2509.02379.

    Take it on a GPU with hundreds of scans, with the MedDINOv3 or DINOv3 ViT-B weights; resolution decides (the paper:
    +2.1 Dice from 640 to 896 px), so raise `--set plan.magnification` until a whole slice has 896 pixels, and let crops
    cover it (slices of 512: `--set plan.magnification=1.75 --set 'plan.crop=[512,512]'`).
    Rates as in the release (decoder 3e-4, ViT 3e-5; the paper names only 3e-4).
    """
    return FinetuneConfig(
        recipe="meddinov3",
        decoder="primus",
        adaptation="full",
        learning_rate=3e-4,
        backbone_lr_scale=0.1,
        betas=(0.9, 0.98),
        weight_decay=0.05,
        warmup=0.0,
        schedule="linear",
        grad_clip=12.0,
        drop_path=0.2,
        augment=NNUNET_2D,
    )


def dinomed3d() -> FinetuneConfig:
    """DINO-Med3D in two stages: encoder to the domain, then 3-D adapters in it and a detail stream. arXiv 2606.18886.

    Stage 1 trains the whole encoder on three neighbouring slices with a linear proxy head. Stage 2 freezes it, puts
    adapters along the slice axis into its blocks, and trains them with the detail-recovery stream and the 3-D decoder.
    Take it for volumes with structures that run through many slices, on a GPU.
    Differences from the release, which follow the paper: adapters inside the blocks (there: only after the last, with
    LoRA; see `dinomed3d_release`); the proxy head learns at 1e-3 (there 1e-5, as the encoder), stage 2 at 5e-4 (there
    1e-4); rates fall on a cosine (there: halved when the score stands still).
    """
    return FinetuneConfig(
        recipe="dinomed3d",
        first=FinetuneConfig(
            recipe="dinomed3d_stage1",
            decoder="linear",
            adaptation="full",
            tap_norm=False,
            learning_rate=1e-3,
            backbone_lr_scale=0.01,
            loss="dinomed3d",
        ),
        tap_norm=False,
        decoder="upernet3d",
        depth_adapter=64,
        detail="volume",
        gradient_checkpointing=True,
        slices_at_once=4,
        learning_rate=5e-4,
        loss="dinomed3d",
    )


def dinomed3d_release() -> FinetuneConfig:
    """DINO-Med3D as released: stage 2 with LoRA (rank 16) and adapters only after the backbone. arXiv 2606.18886.

    Take it to compare with the release. Its cubic transposed kernels, which add slices, are `release_kernels` among the
    decoder_settings.
    """
    paper = dinomed3d()
    return paper.model_copy(
        update={
            "recipe": "dinomed3d_release",
            "adaptation": "lora",
            "backbone_lr_scale": 1.0,
            "depth_adapter": 0,
            "lora_dropout": 0.1,
            "learning_rate": 1e-4,
        }
    )


def frozen_conv3d() -> FinetuneConfig:
    """The benchmark's probe: frozen slices stacked to a volume, a light 3-D convolutional decoder. arXiv 2509.06467.

    Take it to compare backbones on volumes. Rate 2e-3 (paper: 1e-4, for many more steps than ours); the paper leaves
    taps and widths open.
    """
    return FinetuneConfig(recipe="frozen_conv3d", decoder="conv3d", learning_rate=2e-3, slab=32, batch_size=1)


def frozen_detail3d() -> FinetuneConfig:
    """Frozen slices in a light 3-D decoder, refined by a detail stream that sees every voxel. Ours.

    Take it for volumes: features are computed once, and a small 3-D network learns the boundaries in minutes.
    The benchmark's probe (arXiv 2509.06467) with the detail stream of DINO-Med3D (arXiv 2606.18886). One slab a step:
    for a given time, twice the steps teach more than slabs in pairs (hippocampus, four minutes: 0.88 against 0.86).
    Tokens are larger than the plan says: the stream sees what is small, and smaller images leave time to train (eight
    minutes: 0.873 against 0.862).
    """
    return FinetuneConfig(
        recipe="frozen_detail3d",
        magnification_scale=0.55,
        decoder="conv3d",
        detail="volume",
        learning_rate=2e-3,
        slab=32,
        batch_size=1,
    )


def linear_probe() -> FinetuneConfig:
    """One linear layer on the last block's tokens, upsampled: what the features alone know. arXiv 2509.06467.

    Take it to compare backbones, not to segment: nothing finer than a token is learned.
    """
    return FinetuneConfig(recipe="linear_probe", decoder="linear", learning_rate=2e-3, weight_decay=0.0)


def unet_2d() -> FinetuneConfig:
    """nnU-Net's 2-D U-Net from random weights in the same loop, no backbone. arXiv 1904.08128.

    Take it as the baseline that a backbone has to beat: the CNN everyone compares with. Built by
    dynamic-network-architectures (`pip install voxdino[baseline]`).
    """
    return FinetuneConfig(recipe="unet_2d", backbone="none", decoder="unet_2d", augment=NNUNET_2D)


def unet_3d() -> FinetuneConfig:
    """nnU-Net's 3-D U-Net from random weights in the same loop, no backbone. arXiv 1904.08128.

    Take it as the baseline for volumes. See `unet_2d`.
    """
    return FinetuneConfig(recipe="unet_3d", backbone="none", decoder="unet_3d", slab=32, batch_size=1)


RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        segdino_v2,
        segdino_v2_lora,
        segdino_v2_full,
        segdino_v1,
        meddinov3,
        dinomed3d,
        dinomed3d_release,
        frozen_conv3d,
        frozen_detail3d,
        linear_probe,
        unet_2d,
        unet_3d,
    )
}
