"""Where published backbones lie on the Hugging Face hub, and the only code of voxdino that fetches from it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from voxdino.core.errors import ResourceError

Download = Callable[[str, str, Path], Path]  # repository, file name, folder to put it in -> the file


class HubCopy(NamedTuple):
    """A backbone's repository and the files to fetch, the weights first."""

    repository: str
    files: tuple[str, ...] = ("model.safetensors", "config.json")


# The timm copies need no account (Meta agreed to them); the licence is that of the original weights.
HUB_COPIES: dict[str, HubCopy] = {
    "dinov3_vits16": HubCopy("timm/vit_small_patch16_dinov3.lvd1689m"),
    "dinov3_vits16plus": HubCopy("timm/vit_small_plus_patch16_dinov3.lvd1689m"),
    "dinov3_vitb16": HubCopy("timm/vit_base_patch16_dinov3.lvd1689m"),
    "dinov3_vitl16": HubCopy("timm/vit_large_patch16_dinov3.lvd1689m"),
    "dinov3_vith16plus": HubCopy("timm/vit_huge_plus_patch16_dinov3.lvd1689m"),
    "dinov3_vit7b16": HubCopy("timm/vit_7b_patch16_dinov3.lvd1689m"),
    "dinov2_vits14": HubCopy("timm/vit_small_patch14_dinov2.lvd142m"),
    "dinov2_vitb14": HubCopy("timm/vit_base_patch14_dinov2.lvd142m"),
    "dinov2_vitl14": HubCopy("timm/vit_large_patch14_dinov2.lvd142m"),
    "dinov2_vitg14": HubCopy("timm/vit_giant_patch14_dinov2.lvd142m"),
    "dinov2_vits14_reg": HubCopy("timm/vit_small_patch14_reg4_dinov2.lvd142m"),
    "dinov2_vitb14_reg": HubCopy("timm/vit_base_patch14_reg4_dinov2.lvd142m"),
    "dinov2_vitl14_reg": HubCopy("timm/vit_large_patch14_reg4_dinov2.lvd142m"),
    "dinov2_vitg14_reg": HubCopy("timm/vit_giant_patch14_reg4_dinov2.lvd142m"),
    "dinov3_convnext_tiny": HubCopy("timm/convnext_tiny.dinov3_lvd1689m"),
    "dinov3_convnext_small": HubCopy("timm/convnext_small.dinov3_lvd1689m"),
    "dinov3_convnext_base": HubCopy("timm/convnext_base.dinov3_lvd1689m"),
    "dinov3_convnext_large": HubCopy("timm/convnext_large.dinov3_lvd1689m"),
    "meddinov3_vitb16": HubCopy("ricklisz123/MedDINOv3-ViTB-16-CT-3M", ("model.pth",)),
}


def find_copy(name: str) -> HubCopy | None:
    """The copy of a backbone known by name; a repository "owner/name" is taken as it is; None for anything else.

    "timm:<model>.<tag>" is the repository of that name which the timm library keeps.
    """
    if name in HUB_COPIES:
        return HUB_COPIES[name]
    if name.startswith("timm:"):
        name = f"timm/{name.removeprefix('timm:')}"
    owner, _, repository = name.partition("/")
    return HubCopy(name) if owner and repository and "/" not in repository else None


def fetch(copy: HubCopy, folder: Path, download: Download | None = None) -> Path:
    """Fetch the files of `copy` into `folder`; returns the weights file. Broken downloads resume.

    Errors: ResourceError with the way to get the file by hand.
    """
    download = download or _download_from_hub
    try:
        paths = [download(copy.repository, name, folder) for name in copy.files]
    except Exception as error:  # the client raises dozens of kinds, from DNS to gated repositories
        address = f"https://huggingface.co/{copy.repository}/resolve/main/{copy.files[0]}"
        raise ResourceError(
            f"could not be fetched ({_first_line(error)})",
            where=copy.repository,
            fix=f"on a machine with access get {address} (accept the licence there if asked; `hf auth login` for gated "
            "files), copy it here, and run: voxdino weights import FILE.",
        ) from error
    return paths[0]


def _download_from_hub(repository: str, name: str, folder: Path) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, name, local_dir=folder, library_name="voxdino"))


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
