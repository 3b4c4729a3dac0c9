"""Backbones from their sources: loaded completely or refused, imported into a folder with a card beside each."""

import json
import re
import shutil
from collections.abc import Mapping
from os import PathLike, environ, fspath
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from voxdino.core.errors import ConfigError, UsageError, WeightsError
from voxdino.core.locks import lock_folder
from voxdino.core.records import nearest
from voxdino.core.safe_files import digest_bytes, digest_file, read_json, require_free_space, write_atomic
from voxdino.models import hub
from voxdino.models.backbones.base import Backbone
from voxdino.models.backbones.build import BackboneConfig, backbone_from_state, build_backbone
from voxdino.models.backbones.no_backbone import NoBackbone, NoBackboneConfig
from voxdino.models.backbones.pixels import PixelConfig, Pixels
from voxdino.models.backbones.timm_bridge import TimmConfig
from voxdino.models.backbones.vit import ViT, ViTConfig
from voxdino.models.foreign import backbone_of_model, convert_model, recognise
from voxdino.models.layouts import BackboneState, convert, convert_timm
from voxdino.models.registry import BACKBONES, look_up
from voxdino.models.slim import slimmed
from voxdino.models.tensor_files import read_tensors as read_tensors
from voxdino.models.weights_card import WeightsCard

LICENCES = {"dinov3": "DINOv3 License", "dinov3_convnext": "DINOv3 License", "dinov2": "Apache-2.0"}
_LICENCE_PAGES = {
    "DINOv3 License": "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
}
BUILT_IN = "voxdino_tiny"  # weights inside the package
BUILT_IN_FILE = Path(__file__).with_name("built_in") / f"{BUILT_IN}.safetensors"
_RANDOM, _SLIM, _TIMM, _PIXELS, _NONE = "random:", "slim:", "timm:", "pixels:", "none"
_CARD_KEY = "voxdino"  # in the metadata of our safetensors files
_GENERIC_STEMS = {"model", "pytorch_model", "teacher_checkpoint", "checkpoint", "weights"}
_AGAIN = "download or copy it again."


class WeightsFile(NamedTuple):
    """A file's backbone, all its tensors (those of a whole model by the names of our Segmenter), and its card."""

    backbone: BackboneState
    tensors: dict[str, Tensor]
    card: WeightsCard


def default_weights_folder() -> Path:
    """VOXDINO_WEIGHTS where set, else ~/.voxdino/weights; where there is no home, voxdino-weights here."""
    if folder := environ.get("VOXDINO_WEIGHTS"):
        return Path(folder)
    try:
        return Path.home() / ".voxdino" / "weights"
    except RuntimeError:
        return Path("voxdino-weights")


def load_backbone(
    source: str | PathLike[str],
    *,
    weights_folder: Path | None = None,
    settings: Mapping[str, str] | None = None,
) -> tuple[Backbone, WeightsCard]:
    """A backbone in eval mode and its card.

    source:   a .safetensors or .pth file, a folder with config.json and model.safetensors, the name of imported
              or built-in weights, or "random:<backbone>" for an untrained one (always the same); "timm:<model>@<file>"
              for weights of the timm library, "timm:<model>" for such that were imported, "random:timm:<model>";
              "pixels:<patch>" for the raw pixels, without any weights; "none";
              "slim:<backbone>@<source>" for a narrow ViT out of a wide one, to be distilled.
    settings: fields of the configuration that the file cannot say, e.g. {"num_heads": "12"}.
    Errors: WeightsError (incomplete, damaged, unknown), SafetyError (code in a file), ResourceError (no timm).
    """
    text = fspath(source)
    if text == _NONE:
        return NoBackbone(NoBackboneConfig()).eval(), _card_without_weights(text, NoBackboneConfig(), b"")
    if text.startswith(_PIXELS):
        size = text.removeprefix(_PIXELS)
        pixels = PixelConfig.from_json({"patch_size": int(size) if size.isdecimal() else size}, where=text)
        return Pixels(pixels).eval(), _card_without_weights(text, pixels, text.encode())
    if text.startswith(_RANDOM):
        return _random_backbone(text, settings or {})
    if text.startswith(_SLIM):
        return _slim_backbone(text, weights_folder, settings or {})
    state, _, card = read_weights(source, weights_folder=weights_folder, settings=settings)
    return backbone_from_state(state.config, state.tensors), card


def read_weights(
    source: str | PathLike[str],
    *,
    weights_folder: Path | None = None,
    settings: Mapping[str, str] | None = None,
) -> WeightsFile:
    """What `load_backbone` reads, of files and imported names; with the whole model where the file holds one."""
    text = fspath(source)
    folder = weights_folder or default_weights_folder()
    is_timm = text.startswith(_TIMM) and "@" not in text
    name = text.removeprefix(_TIMM) if is_timm else text
    named = _file_of(name, folder) if _is_name(name) else None
    path = named or Path(text)
    if named is None and (is_timm or _is_name(name)) and not path.exists():
        raise _unknown_name(text, folder)
    return _read_file(path, settings)


def is_here(name: str, weights_folder: Path | None = None) -> bool:
    """Whether imported or built-in weights have this name."""
    return _file_of(name, weights_folder or default_weights_folder()) is not None


def _file_of(name: str, folder: Path) -> Path | None:
    if _card_path(folder, name).is_file():
        return folder / f"{name}.safetensors"
    return BUILT_IN_FILE if name == BUILT_IN else None


def inspect_weights(path: str | PathLike[str], *, settings: Mapping[str, str] | None = None) -> WeightsCard:
    """The card the file would get, after all the checks of loading it."""
    return _read_file(Path(path), settings).card


def import_weights(
    path: str | PathLike[str],
    weights_folder: Path,
    name: str | None = None,
    *,
    licence: str | None = None,
    source: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> WeightsCard:
    """Convert a file to our layout in the weights folder, with its card; the same file again changes nothing.

    A model of other authors (see voxdino.models.foreign) is kept whole; its name then stands for its backbone too.

    path:    a file, a folder with one, or "timm:<model>@<file>".
    licence: what the user says it is; default: DINOv3 License for DINOv3 weights, Apache-2.0 for DINOv2.
    Errors: those of loading; UsageError for a bad name, or one that other weights have already.
    """
    state, tensors, found = _read_file(Path(path), settings)
    name = name or _name_for(Path(path), state.config, is_model=found.model is not None)
    if not _is_name(name):
        raise UsageError(f"{name!r} is no name for weights", fix="use letters, digits, '.', '_' and '-'.")
    target = weights_folder / f"{name}.safetensors"
    with lock_folder(weights_folder):
        if _card_path(weights_folder, name).is_file() and target.is_file():
            card = WeightsCard.read(_card_path(weights_folder, name))
            if card.source_digest == found.source_digest:
                return card
            raise UsageError(
                f"other weights are named {name!r} already (from {card.source})",
                where=weights_folder,
                fix="import under another name: --name NAME.",
            )
        card = found.model_copy(
            update={
                "name": name,
                "licence": licence or found.licence,
                "source": source or found.source,
                "model": found.model and found.model.around(name),
            }
        )
        require_free_space(weights_folder, 5 * _count(tensors))
        embedded = card.model_copy(update={"file_digest": ""})  # a file cannot hold its own digest
        with write_atomic(target) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", _CARD_KEY: embedded.model_dump_json()})
        card = card.model_copy(update={"file_digest": digest_file(target)})
        card.write(_card_path(weights_folder, name))
    return card


def write_backbone(path: Path, tensors: Mapping[str, Tensor], card: WeightsCard) -> None:
    """One plain file that `load_backbone` takes, replaced at once and never half, with its card inside.

    Errors: ResourceError when it cannot be written.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with write_atomic(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt", _CARD_KEY: card.model_dump_json()})


def pull_weights(
    name: str,
    weights_folder: Path,
    *,
    licence: str | None = None,
    download: hub.Download | None = None,
) -> WeightsCard:
    """Fetch a known backbone, or any hub repository "owner/name", and import it. The only function that connects.

    "timm:<model>" fetches the repository that timm keeps for it, and imports it as a model of the timm library.
    What is imported already is not fetched again.

    download: replaces the hub's client (repository, file, folder) -> path; for mirrors and tests.
    Errors: UsageError for unknown names; ResourceError when it cannot be fetched, saying how to do it by hand.
    """
    copy = hub.find_copy(name)
    if copy is None:
        known = ", ".join(hub.HUB_COPIES)
        fact = f"no backbone {name!r} to fetch.{nearest(name, hub.HUB_COPIES)}"
        raise UsageError(fact, fix=f"known: {known}; or a repository as owner/name.")
    is_timm = name.startswith(_TIMM)
    short = name if name in hub.HUB_COPIES else copy.repository.partition("/")[2]
    if _card_path(weights_folder, short).is_file() and (weights_folder / f"{short}.safetensors").is_file():
        return WeightsCard.read(_card_path(weights_folder, short))
    folder = weights_folder / ".download" / copy.repository.replace("/", "--")
    path = hub.fetch(copy, folder, download)
    try:
        given = f"{name}@{path}" if is_timm else path
        return import_weights(given, weights_folder, short, licence=licence, source=copy.repository)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a refused file must not be taken for a finished download


def list_weights(weights_folder: Path | None = None) -> tuple[WeightsCard, ...]:
    """Cards of the imported weights, by name."""
    folder = weights_folder or default_weights_folder()
    cards = sorted(path for path in folder.glob("*.json") if (folder / f"{path.stem}.safetensors").is_file())
    return tuple(WeightsCard.read(path) for path in cards)


def licence_notice_once(card: WeightsCard, weights_folder: Path) -> str | None:
    """What to print about the licence the first time these weights are used; None afterwards."""
    path = _card_path(weights_folder, card.name)
    if card.licence_shown or not path.is_file():
        return None
    card.model_copy(update={"licence_shown": True}).write(path)
    page = _LICENCE_PAGES.get(card.licence)
    place = f" ({page})" if page else ""
    return f"{card.name}: licence {card.licence}{place}. Models trained from these weights inherit it."


def _random_backbone(source: str, settings: Mapping[str, str]) -> tuple[Backbone, WeightsCard]:
    name = source.removeprefix(_RANDOM)
    if name.startswith(_TIMM):
        config: BackboneConfig = TimmConfig.from_json({"model": name.removeprefix(_TIMM)}, where=source)
    else:
        config = look_up(BACKBONES, name, kind="backbone").with_settings(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build_backbone(config).eval()
    digest = digest_bytes(save(dict(backbone.state_dict())))
    card = WeightsCard(
        name=source,
        layout="voxdino",
        licence="none (random weights)",
        source=source,
        file_digest=digest,
        source_digest=digest,
        config=config,
        num_parameters=_count(backbone.state_dict()),
        notes=("random weights: nothing was learned",),
        licence_shown=True,
    )
    return backbone, card


def _slim_backbone(
    source: str, weights_folder: Path | None, settings: Mapping[str, str]
) -> tuple[Backbone, WeightsCard]:
    name, _, origin = source.removeprefix(_SLIM).partition("@")
    config = look_up(BACKBONES, name, kind="backbone").with_settings(settings)
    if not origin or not isinstance(config, ViTConfig):
        fix = "write slim:<backbone>@<weights>, both of them vision transformers."
        raise WeightsError("is no vision transformer out of a wider one", where=source, fix=fix)
    wide, card = load_backbone(origin, weights_folder=weights_folder)
    if not isinstance(wide, ViT):
        raise WeightsError(f"{card.name} is no vision transformer.", where=source, fix="choose a wide ViT.")
    backbone = slimmed(wide, config)
    update = {
        "name": f"slim:{name}@{card.name}",
        "file_digest": digest_bytes(save(dict(backbone.state_dict()))),
        "config": config,
        "num_parameters": _count(backbone.state_dict()),
        "notes": (*card.notes, f"every other channel, head and unit of {card.name}: made to be distilled"),
        "model": None,
    }
    return backbone, card.model_copy(update=update)


def _card_without_weights(name: str, config: BackboneConfig, content: bytes) -> WeightsCard:
    digest = digest_bytes(content)
    return WeightsCard(
        name=name,
        layout="voxdino",
        licence="none (no backbone)",
        source=name,
        file_digest=digest,
        source_digest=digest,
        config=config,
        num_parameters=0,
        licence_shown=True,
    )


def _read_file(path: Path, settings: Mapping[str, str] | None) -> WeightsFile:
    """Read and convert a file; where a card of ours lies beside it, its digest must agree."""
    if fspath(path).startswith(_TIMM):
        return _read_timm(fspath(path))
    hub_config: dict[str, Any] | None = None
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "model.pth") if (path / name).is_file()]
        if not found:
            fix = "give one weights file, or a folder with config.json and model.safetensors in one part."
            raise WeightsError("a folder without model.safetensors", where=path, fix=fix)
        path = found[0]
    if path.stem in _GENERIC_STEMS and path.with_name("config.json").is_file():
        hub_config = read_json(path.with_name("config.json"))
        if not isinstance(hub_config, dict):
            raise ConfigError("is no JSON object", where=path.with_name("config.json"), fix=_AGAIN)
    tensors, metadata = read_tensors(path)
    digest = digest_file(path)
    own = _own_card(path, metadata, digest)
    if own is not None:
        if own.model is not None:
            state = backbone_of_model(tensors, own.model, own.config, settings=settings, where=path)
        else:
            state = convert(tensors, own_config=own.config, settings=settings, where=path)
            tensors = state.tensors
        return WeightsFile(state, tensors, own.model_copy(update={"config": state.config, "file_digest": digest}))
    if recognise(tensors):
        model = convert_model(tensors, name=path.stem, facts=metadata, settings=settings, where=path)
        card = _new_card(path, digest, model.backbone).model_copy(update={"model": model.description})
        return WeightsFile(model.backbone, model.tensors, card)
    state = convert(tensors, hub_config=hub_config, settings=settings, where=path)
    return WeightsFile(state, state.tensors, _new_card(path, digest, state))


def _new_card(path: Path, digest: str, state: BackboneState, *, name: str = "", licence: str = "") -> WeightsCard:
    return WeightsCard(
        name=name or path.stem,
        layout=state.layout,
        licence=licence or LICENCES[state.config.family],
        source=path.name,
        file_digest=digest,
        source_digest=digest,
        config=state.config,
        num_parameters=_count(state.tensors),
        notes=state.notes,
    )


def _read_timm(source: str) -> WeightsFile:
    """Of "timm:<model>@<file>"."""
    model, _, file = source.removeprefix(_TIMM).partition("@")
    path = Path(file)
    state, licence = convert_timm(read_tensors(path)[0], model, where=path)
    return WeightsFile(state, state.tensors, _new_card(path, digest_file(path), state, name=model, licence=licence))


def _own_card(path: Path, metadata: Mapping[str, str], digest: str) -> WeightsCard | None:
    """The card of a file of ours: the one beside it (with its digest checked), else the one inside."""
    if _CARD_KEY not in metadata:
        return None
    beside = path.with_name(f"{path.stem}.json")
    if not beside.is_file():
        try:
            return WeightsCard.from_json(json.loads(metadata[_CARD_KEY]), where=path)
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"has an unreadable card inside ({error})", where=path, fix=_AGAIN) from error
    card = WeightsCard.read(beside)
    if card.file_digest != digest:
        raise WeightsError(
            f"is changed or damaged: SHA-256 {digest[:12]}…, its card {beside.name} says {card.file_digest[:12]}…",
            where=path,
            fix="remove both files and import the weights again.",
        )
    return card


def _count(tensors: Mapping[str, Tensor]) -> int:
    """Numbers in the learned tensors (masks and rotary periods are none)."""
    return sum(v.numel() for k, v in tensors.items() if not k.endswith((".bias_mask", "rope_embed.periods")))


def _card_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) is not None


def _name_for(path: Path, config: BackboneConfig, *, is_model: bool) -> str:
    """The file's own name; a published backbone's for `model.safetensors` and the like, if that is all it holds."""
    if isinstance(config, TimmConfig):
        return config.model
    stem = path.name if path.is_dir() else path.stem
    if stem not in _GENERIC_STEMS:
        return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-") or "backbone"
    for name, published in BACKBONES.items():
        if not is_model and _size(published) == _size(config):
            return name
    raise UsageError("these weights need a name", where=path.name, fix="say it: --name NAME.")


def _size(config: BackboneConfig) -> tuple[object, ...]:
    """What tells the published backbones apart."""
    if isinstance(config, ViTConfig):
        return config.embed_dim, config.depth, config.patch_size, config.ffn, config.num_registers
    return config.family, config


def _unknown_name(name: str, folder: Path) -> WeightsError:
    known = [path.stem for path in sorted(folder.glob("*.safetensors"))] if folder.is_dir() else []
    if name.startswith(_TIMM):
        raise WeightsError(
            "no imported weights of this model of timm",
            where=name,
            fix=f"fetch them: voxdino weights pull {name}; or name their file: {name}@FILE; or random:{name}.",
        )
    fix = (
        f"fetch it: voxdino weights pull {name}"
        if name in hub.HUB_COPIES
        else "voxdino weights list shows what is there"
    )
    return WeightsError(
        f"no file and no imported weights of this name.{nearest(name, known)}",
        where=name,
        fix=f"{fix}; or import a file: voxdino weights import FILE.",
    )
