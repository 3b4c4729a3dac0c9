"""Weights files: read safely, loaded completely or refused, imported into a folder with a card beside each.

The only module that calls torch.load, and only with weights_only=True; a refusal is final.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Mapping
from os import PathLike, environ, fspath
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from voxdino.core.errors import ConfigError, SafetyError, UsageError, WeightsError
from voxdino.core.records import Record, nearest
from voxdino.core.safe_files import (
    digest_bytes,
    digest_file,
    lock_folder,
    read_json,
    require_file,
    require_free_space,
    write_atomic,
)
from voxdino.models import hub
from voxdino.models.backbones.vit import ViT, ViTConfig
from voxdino.models.layouts import BackboneState, convert
from voxdino.models.registry import BACKBONES, look_up

LICENCES = {"dinov3": "DINOv3 License", "dinov2": "Apache-2.0"}
_LICENCE_PAGES = {
    "DINOv3 License": "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
}
_RANDOM = "random:"
_CARD_KEY = "voxdino"  # in the metadata of our safetensors files
_WRAPPERS = ("teacher", "model", "state_dict")
_GENERIC_STEMS = {"model", "pytorch_model", "teacher_checkpoint", "checkpoint", "weights"}
_AGAIN = "download or copy it again."


class WeightsCard(Record):
    """What is known of a backbone's weights; `<name>.json` beside `<name>.safetensors`, and part of every model.

    licence:       inherited by everything trained from the weights.
    source:        the file's name or the repository it came from; never a path of somebody's machine.
    file_digest:   SHA-256 of the file the weights are in now; source_digest: of the file they came from.
    licence_shown: the licence was printed once already.
    """

    name: str
    layout: str
    licence: str
    source: str
    file_digest: str
    source_digest: str
    config: ViTConfig
    num_parameters: int
    notes: tuple[str, ...] = ()
    licence_shown: bool = False
    format_version: int = 1


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
) -> tuple[ViT, WeightsCard]:
    """A backbone in eval mode and its card.

    source:   a .safetensors or .pth file, a folder with config.json and model.safetensors, the name of imported
              weights, or "random:<backbone>" for an untrained one (always the same).
    settings: fields of ViTConfig that the file cannot say, e.g. {"num_heads": "12"}.
    Errors: WeightsError (incomplete, damaged, unknown), SafetyError (code in a file).
    """
    text = fspath(source)
    if text.startswith(_RANDOM):
        return _random_backbone(text, settings or {})
    folder = weights_folder or default_weights_folder()
    is_imported = _is_name(text) and _card_path(folder, text).is_file()
    path = folder / f"{text}.safetensors" if is_imported else Path(text)
    if not is_imported and _is_name(text) and not path.exists():
        raise _unknown_name(text, folder)
    state, card = _read_backbone(path, settings)
    return ViT.from_state(state.config, state.tensors), card


def inspect_weights(path: str | PathLike[str], *, settings: Mapping[str, str] | None = None) -> WeightsCard:
    """The card the file would get, after all the checks of loading it."""
    return _read_backbone(Path(path), settings)[1]


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

    licence: what the user says it is; default: DINOv3 License for DINOv3 weights, Apache-2.0 for DINOv2.
    Errors: those of loading; UsageError for a bad name, or one that other weights have already.
    """
    state, found = _read_backbone(Path(path), settings)
    name = name or _name_for(Path(path), state.config)
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
            update={"name": name, "licence": licence or found.licence, "source": source or found.source}
        )
        require_free_space(weights_folder, 5 * card.num_parameters)
        embedded = card.model_copy(update={"file_digest": ""})  # a file cannot hold its own digest
        with write_atomic(target) as temporary:
            save_file(state.tensors, temporary, metadata={"format": "pt", _CARD_KEY: embedded.model_dump_json()})
        card = card.model_copy(update={"file_digest": digest_file(target)})
        card.write(_card_path(weights_folder, name))
    return card


def pull_weights(
    name: str,
    weights_folder: Path,
    *,
    licence: str | None = None,
    download: hub.Download | None = None,
) -> WeightsCard:
    """Fetch a known backbone, or any hub repository "owner/name", and import it. The only function that connects.

    What is imported already is not fetched again.

    download: replaces the hub's client (repository, file, folder) -> path; for mirrors and tests.
    Errors: UsageError for unknown names; ResourceError when it cannot be fetched, saying how to do it by hand.
    """
    copy = hub.find_copy(name)
    if copy is None:
        known = ", ".join(hub.HUB_COPIES)
        fact = f"no backbone {name!r} to fetch.{nearest(name, hub.HUB_COPIES)}"
        raise UsageError(fact, fix=f"known: {known}; or a repository as owner/name.")
    short = name if name in hub.HUB_COPIES else copy.repository.partition("/")[2]
    if _card_path(weights_folder, short).is_file() and (weights_folder / f"{short}.safetensors").is_file():
        return WeightsCard.read(_card_path(weights_folder, short))
    folder = weights_folder / ".download" / copy.repository.replace("/", "--")
    path = hub.fetch(copy, folder, download)
    try:
        return import_weights(path, weights_folder, short, licence=licence, source=copy.repository)
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


def _random_backbone(source: str, settings: Mapping[str, str]) -> tuple[ViT, WeightsCard]:
    name = source.removeprefix(_RANDOM)
    config = look_up(BACKBONES, name, kind="backbone").with_settings(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = ViT(config).eval()
    digest = digest_bytes(save(dict(vit.state_dict())))
    card = WeightsCard(
        name=source,
        layout="voxdino",
        licence="none (random weights)",
        source=source,
        file_digest=digest,
        source_digest=digest,
        config=config,
        num_parameters=_count(vit.state_dict()),
        notes=("random weights: nothing was learned",),
        licence_shown=True,
    )
    return vit, card


def _read_backbone(path: Path, settings: Mapping[str, str] | None) -> tuple[BackboneState, WeightsCard]:
    """Read and convert a file; where a card of ours lies beside it, its digest must agree."""
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
    state = convert(
        tensors, hub_config=hub_config, own_config=own.config if own else None, settings=settings, where=path
    )
    if own is not None:
        return state, own.model_copy(update={"config": state.config, "file_digest": digest})
    return state, WeightsCard(
        name=path.stem,
        layout=state.layout,
        licence=LICENCES[state.config.family],
        source=path.name,
        file_digest=digest,
        source_digest=digest,
        config=state.config,
        num_parameters=_count(state.tensors),
        notes=state.notes,
    )


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


def read_tensors(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors or .pth file, told apart by content.

    Errors: WeightsError for web pages, Git LFS pointers, empty, truncated, damaged or foreign files; SafetyError for
    pickles that hold more than tensors, and for the old torch formats, which are pickles throughout.
    """
    size = require_file(path, kind=WeightsError)
    with Path(path).open("rb") as file:
        head = file.read(512)
    if re.match(rb"\s*<(!doctype|html|head|\?xml)", head, re.IGNORECASE):
        fix = "download it again; the address may need a login or an accepted licence."
        raise WeightsError("is a web page, not weights", where=path, fix=fix)
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError("is a Git LFS pointer, not the weights", where=path, fix="run `git lfs pull` in its folder.")
    if head.startswith(b"PK\x03\x04"):
        return _read_torch(Path(path), size), {}
    if head[8:9] == b"{":
        return _read_safetensors(Path(path), size, int.from_bytes(head[:8], "little"))
    if head[:1] in (b"\x80", b"(", b"c") or head[257:262] == b"ustar":
        raise SafetyError(
            "an old torch or pickle file, which can run code when opened; refused",
            where=path,
            fix="get the weights as .safetensors, or have their author save them with a current torch.save.",
        )
    raise WeightsError("neither a safetensors nor a torch file", where=path, fix=_AGAIN)


def _read_safetensors(path: Path, size: int, header_size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    if 8 + header_size > size:
        raise WeightsError(f"is cut off: {size} bytes, its header alone needs {header_size}", where=path, fix=_AGAIN)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        what = "is cut off or damaged" if "incomplete" in str(error).lower() else "is damaged"
        raise WeightsError(f"{what} ({error})", where=path, fix=_AGAIN) from error


def _read_torch(path: Path, size: int) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members) or (
                sum(member.file_size for member in members) > size
            ):
                fact = "holds compressed or overlapping members, which torch never writes; refused"
                raise SafetyError(fact, where=path, fix="get the weights as .safetensors from a source you trust.")
            damaged = archive.testzip()  # torch.load does not look at the checksums
    except (zipfile.BadZipFile, EOFError) as error:
        raise WeightsError(f"is cut off or damaged ({error})", where=path, fix=_AGAIN) from error
    if damaged is not None:
        raise WeightsError(f"is damaged: {damaged} does not have its checksum", where=path, fix=_AGAIN)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            raise SafetyError(
                "holds code or objects other than tensors; refused and not tried again in any other way",
                where=path,
                fix="get the weights as .safetensors from a source you trust.",
            ) from error
        raise WeightsError(f"is no torch checkpoint ({str(error)[:120]})", where=path, fix=_AGAIN) from error
    return _only_tensors(content, path, size)


def _only_tensors(content: Any, path: Path, size: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint, out of the dictionary that wraps them; other entries are bookkeeping."""
    found = content
    for wrapper in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
            break
    tensors = (
        {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
        if isinstance(found, Mapping)
        else {}
    )
    if not tensors:
        keys = (
            ", ".join(str(key) for key in list(content)[:5]) if isinstance(content, Mapping) else type(content).__name__
        )
        raise WeightsError(f"holds no tensors (found: {keys})", where=path, fix="give the file of a backbone.")
    if any(value.layout != torch.strided or value.is_quantized for value in tensors.values()):
        raise WeightsError("holds sparse or quantised tensors", where=path, fix="give the file in full precision.")
    if sum(value.numel() * value.element_size() for value in tensors.values()) > 4 * size:
        fact = "declares tensors far larger than the file; refused"
        raise SafetyError(fact, where=path, fix="get the weights as .safetensors from a source you trust.")
    return tensors


def _count(tensors: Mapping[str, Tensor]) -> int:
    """Numbers in the learned tensors (masks and rotary periods are none)."""
    return sum(v.numel() for k, v in tensors.items() if not k.endswith((".bias_mask", "rope_embed.periods")))


def _card_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) is not None


def _name_for(path: Path, config: ViTConfig) -> str:
    """The file's own name; a published backbone's for `model.safetensors` and the like."""
    stem = path.name if path.is_dir() else path.stem
    if stem not in _GENERIC_STEMS:
        return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-") or "backbone"
    for name, published in BACKBONES.items():
        if (published.embed_dim, published.depth, published.patch_size, published.ffn, published.num_registers) == (
            config.embed_dim, config.depth, config.patch_size, config.ffn, config.num_registers
        ):  # fmt: skip
            return name
    raise UsageError("these weights need a name", where=path.name, fix="say it: --name NAME.")


def _unknown_name(name: str, folder: Path) -> WeightsError:
    known = [path.stem for path in sorted(folder.glob("*.safetensors"))] if folder.is_dir() else []
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
