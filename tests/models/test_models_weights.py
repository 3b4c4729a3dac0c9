"""Weights files: what is read, what is refused and in which words, importing, pulling, licences."""

import io
import pickle
import socket
import struct
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from voxdino.core.errors import (
    EXIT_INPUT,
    EXIT_SAFETY,
    ConfigError,
    ResourceError,
    SafetyError,
    UsageError,
    WeightsError,
)
from voxdino.models import hub
from voxdino.models.backbones.vit import ViT
from voxdino.models.registry import BACKBONES, look_up
from voxdino.models.weights import (
    default_weights_folder,
    import_weights,
    inspect_weights,
    licence_notice_once,
    list_weights,
    load_backbone,
    pull_weights,
    read_tensors,
)
from voxdino.models.weights_card import WeightsCard


@pytest.fixture
def file(vit, tmp_path):
    """A backbone in official layout."""
    path = tmp_path / "somebody's vit.safetensors"
    save_file(vit.state_dict(), path)
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "weights"


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 12)


# Loading


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_gives_the_backbone_in_eval_mode(vit, tmp_path, images, suffix):
    path = tmp_path / f"vit{suffix}"
    (torch.save if suffix == ".pth" else save_file)(vit.state_dict(), path)
    loaded, card = load_backbone(path)
    assert torch.equal(loaded(images).maps[-1], vit(images).maps[-1])
    assert not loaded.training
    assert (card.name, card.layout, card.licence, card.source) == (
        "vit",
        "official DINOv3",
        "DINOv3 License",
        path.name,
    )
    assert card.config == vit.config
    assert card.num_parameters == sum(p.numel() for p in vit.parameters())


@pytest.mark.parametrize("wrapper", ["teacher", "model", "state_dict"])
def test_wrapped_checkpoints_are_opened_and_their_bookkeeping_left(vit, tmp_path, images, wrapper):
    inner = {f"backbone.{k}": v for k, v in vit.state_dict().items()} if wrapper == "teacher" else vit.state_dict()
    torch.save({wrapper: inner, "iteration": 4999, "optimizer": {"lr": 1e-4}}, tmp_path / "c.pth")
    loaded, _ = load_backbone(tmp_path / "c.pth")
    assert torch.equal(loaded(images).maps[-1], vit(images).maps[-1])


def test_a_hugging_face_folder_is_read_with_its_config(vit, tmp_path, images):
    from test_models_layouts import as_hugging_face

    save_file(as_hugging_face(vit.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2, "layer_norm_eps": 1e-05}')
    for source in (tmp_path, tmp_path / "model.safetensors"):
        loaded, card = load_backbone(source)
        torch.testing.assert_close(loaded(images).maps[-1], vit(images).maps[-1], rtol=0, atol=2e-6)
        assert card.layout == "Hugging Face DINOv3"


def test_random_backbones_are_always_the_same_and_say_so():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    (a, card), (b, _) = load_backbone("random:tiny"), load_backbone("random:tiny")
    assert torch.equal(torch.rand(1), expected)  # the global generator was left alone
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert card.licence == "none (random weights)"
    assert card.notes == ("random weights: nothing was learned",)


@pytest.mark.shared
def test_the_real_backbone_loads(shared_folder):
    vit, card = load_backbone(shared_folder / "weights" / "dinov2_vits14.safetensors")
    assert card.config == BACKBONES["dinov2_vits14"]
    assert (card.licence, card.notes) == ("Apache-2.0", ("cast from float16 to float32",))
    with torch.no_grad():
        features = vit(torch.randn(1, 3, 28, 42))
    assert features.maps[-1].shape == (1, 384, 2, 3)
    assert all(bool(torch.isfinite(m).all()) for m in features.maps)


# Refusals: damaged and foreign files


def refused(path, words, kind=WeightsError):
    for action in (load_backbone, inspect_weights):
        with pytest.raises(kind, match=words) as caught:
            action(path)
        assert str(caught.value).startswith(str(path))
        assert " Fix: " in str(caught.value)
        assert caught.value.exit_code == (EXIT_SAFETY if kind is SafetyError else EXIT_INPUT)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page, not weights"),
        (b"\n <HTML><body>404</body>", "is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 86\n", "Git LFS pointer"),
        (b"hello world, this is nothing of the kind", "neither a safetensors nor a torch file"),
        (b"\x01", "neither a safetensors nor a torch file"),
    ],
)
def test_files_that_are_no_weights_are_named_for_what_they_are(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path, words)


def test_folders_and_missing_files_are_named(tmp_path):
    refused(tmp_path / "nowhere.pth", "no such file")
    refused(tmp_path, "a folder without model.safetensors")


@pytest.mark.parametrize("share", [0.001, 0.3, 0.99])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_files_are_refused(vit, tmp_path, suffix, share):
    path = tmp_path / f"vit{suffix}"
    (torch.save if suffix == ".pth" else save_file)(vit.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path, "cut off|damaged")


def test_a_flipped_bit_in_a_torch_file_is_refused(vit, tmp_path):
    path = tmp_path / "vit.pth"
    torch.save(vit.state_dict(), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(path, "is damaged: .* does not have its checksum")


def test_a_lying_safetensors_header_is_refused(tmp_path):
    path = tmp_path / "vit.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    refused(path, "cut off|damaged")
    path.write_bytes(struct.pack("<Q", 2**60) + header)
    refused(path, "is cut off")


def test_checkpoints_without_tensors_say_what_they_hold(tmp_path):
    torch.save({"epoch": 3, "config": {}}, tmp_path / "c.pth")
    refused(tmp_path / "c.pth", r"holds no tensors \(found: epoch, config\)")
    torch.save([1, 2], tmp_path / "d.pth")
    refused(tmp_path / "d.pth", r"holds no tensors \(found: list\)")


def test_a_config_that_is_no_object_is_refused(file, tmp_path):
    file.rename(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json: is no JSON object"):
        load_backbone(tmp_path)


# Refusals: code in files


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary.txt"


def test_code_in_a_torch_file_is_refused_and_not_run(vit, tmp_path, canary):
    for name, content in (("a.pth", Canary(canary)), ("b.pth", vit.state_dict() | {"extra": Canary(canary)})):
        torch.save(content, tmp_path / name)
        refused(tmp_path / name, "holds code or objects other than tensors", SafetyError)
    assert not canary.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".safetensors"])
def test_bare_pickles_are_refused_whatever_their_name(tmp_path, canary, protocol, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Canary(canary), protocol=protocol))
    refused(path, "can run code when opened; refused", SafetyError)
    assert not canary.exists()


def test_old_torch_formats_are_refused_even_when_harmless(vit, tmp_path):
    torch.save(vit.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pth", "an old torch or pickle file", SafetyError)
    with tarfile.open(tmp_path / "older.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    refused(tmp_path / "older.tar", "an old torch or pickle file", SafetyError)


def test_compressed_members_are_refused_before_they_are_unpacked(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    refused(path, "compressed or overlapping members", SafetyError)


def test_tensors_larger_than_their_file_are_refused(tmp_path):
    torch.save({"cls_token": torch.zeros(1).expand(10**12)}, tmp_path / "bomb.pth")
    refused(tmp_path / "bomb.pth", "far larger than the file", SafetyError)


# Importing


def test_imported_weights_load_by_name_and_compute_the_same(file, folder, vit, images):
    card = import_weights(file, folder)
    assert card.name == "somebody-s-vit"
    loaded, again = load_backbone(card.name, weights_folder=folder)
    assert torch.equal(loaded(images).maps[-1], vit(images).maps[-1])
    assert again == card == list_weights(folder)[0]
    assert card.source_digest == inspect_weights(file).file_digest
    assert {path.name for path in folder.iterdir()} >= {f"{card.name}.safetensors", f"{card.name}.json"}
    assert load_backbone(folder / f"{card.name}.safetensors")[1] == card


def test_aliases_of_one_storage_become_tensors_of_their_own(vit, folder, tmp_path):
    state = dict(vit.state_dict())
    state["norm.weight"] = state["norm.bias"] = torch.randn(24)
    torch.save(state, tmp_path / "aliases.pth")
    import_weights(tmp_path / "aliases.pth", folder)
    loaded, _ = load_backbone("aliases", weights_folder=folder)
    assert torch.equal(loaded.norm.weight, loaded.norm.bias)
    assert loaded.norm.weight.data_ptr() != loaded.norm.bias.data_ptr()


def test_the_input_of_an_import_is_not_modified(file, folder):
    before = file.read_bytes()
    import_weights(file, folder)
    assert file.read_bytes() == before


def test_importing_the_same_file_again_changes_nothing(file, folder):
    card = import_weights(file, folder, "mine")
    written = (folder / "mine.safetensors").stat().st_mtime_ns
    assert import_weights(file, folder, "mine") == card
    assert (folder / "mine.safetensors").stat().st_mtime_ns == written


def test_other_weights_do_not_take_a_name(file, folder, new_vit, tmp_path):
    import_weights(file, folder, "mine")
    save_file(new_vit(depth=2).state_dict(), tmp_path / "b.safetensors")
    with pytest.raises(UsageError, match=r"other weights are named 'mine' already .*--name"):
        import_weights(tmp_path / "b.safetensors", folder, "mine")


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden", "a b"])
def test_names_that_are_no_file_names_are_refused(file, folder, name):
    with pytest.raises(UsageError):
        import_weights(file, folder, name or "/")


def test_a_nameless_file_of_a_published_size_gets_the_published_name(tmp_path, folder):
    config = BACKBONES["tiny"]
    save_file(ViT(config).state_dict(), tmp_path / "model.safetensors")
    assert import_weights(tmp_path / "model.safetensors", folder).name == "tiny"


def test_a_nameless_file_of_no_published_size_needs_a_name(file, folder, tmp_path):
    file.rename(tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="--name NAME"):
        import_weights(tmp_path / "model.safetensors", folder)


@pytest.mark.parametrize("position", [0.05, 0.5, 0.999])
def test_a_flipped_bit_in_imported_weights_is_noticed(file, folder, position):
    import_weights(file, folder, "mine")
    path = folder / "mine.safetensors"
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"changed or damaged|is damaged"):
        load_backbone("mine", weights_folder=folder)


def test_an_imported_file_without_its_card_still_knows_itself(file, folder, tmp_path):
    card = import_weights(file, folder, "mine", licence="CC BY 4.0")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((folder / "mine.safetensors").read_bytes())
    assert load_backbone(alone)[1] == card


def test_a_hostile_card_inside_a_file_is_refused(vit, tmp_path):
    for text in ("{", "[" * 100_000, '{"name": 3}'):
        save_file(vit.state_dict(), tmp_path / "v.safetensors", metadata={"voxdino": text})
        with pytest.raises((WeightsError, ConfigError)):
            load_backbone(tmp_path / "v.safetensors")


def test_settings_of_an_import_are_kept(vit, folder, tmp_path):
    from test_models_layouts import as_timm

    save_file(as_timm(vit.state_dict()), tmp_path / "t.safetensors")
    import_weights(tmp_path / "t.safetensors", folder, settings={"num_heads": "2"})
    assert load_backbone("t", weights_folder=folder)[0].config.num_heads == 2


def test_no_path_of_the_machine_is_stored(file, folder, tmp_path):
    card = import_weights(file, folder, "mine")
    assert str(tmp_path) not in (folder / "mine.json").read_text()
    assert str(tmp_path).encode() not in (folder / "mine.safetensors").read_bytes()
    assert card.source == file.name


def test_unknown_names_are_refused_with_the_nearest_and_the_way_to_get_them(file, folder):
    import_weights(file, folder, "my_vit")
    with pytest.raises(WeightsError, match=r"my_vitt: .*Did you mean 'my_vit'\?.*voxdino weights import FILE"):
        load_backbone("my_vitt", weights_folder=folder)
    with pytest.raises(WeightsError, match="voxdino weights pull dinov3_vits16"):
        load_backbone("dinov3_vits16", weights_folder=folder)
    with pytest.raises(UsageError, match="Did you mean 'tiny'"):
        load_backbone("random:tinny")


def test_look_up_names_the_known_ones():
    with pytest.raises(UsageError, match=r"unknown decoder 'b'\. Fix: known: a\.|unknown decoder 'b' Fix: known: a\."):
        look_up({"a": 1}, "b", kind="decoder")


# Licences


@pytest.mark.parametrize("said, expected", [(None, "DINOv3 License"), ("Apache-2.0", "Apache-2.0")])
def test_the_licence_is_the_users_word_or_that_of_the_family(file, folder, said, expected):
    import_weights(file, folder, "mine", licence=said)
    assert load_backbone("mine", weights_folder=folder)[1].licence == expected


def test_dinov2_is_apache(new_vit, dinov2_facts, tmp_path):
    save_file(new_vit(**dinov2_facts).state_dict(), tmp_path / "d.safetensors")
    assert inspect_weights(tmp_path / "d.safetensors", settings={"num_heads": "2"}).licence == "Apache-2.0"


def test_the_licence_is_shown_once(file, folder):
    card = import_weights(file, folder, "mine")
    notice = licence_notice_once(card, folder)
    assert notice.startswith("mine: licence DINOv3 License (https://")
    card = WeightsCard.read(folder / "mine.json")
    assert card.licence_shown
    assert licence_notice_once(card, folder) is None


# Pulling


def serve(vit):
    """A stand-in for the hub that has one backbone in timm's layout."""
    from test_models_layouts import as_timm

    asked = []

    def download(repository, name, folder):
        asked.append((repository, name))
        folder.mkdir(parents=True, exist_ok=True)
        if name == "config.json":
            (folder / name).write_text('{"architecture": "vit_small_patch16_dinov3"}')
        else:
            save_file(as_timm(vit.state_dict()), folder / name)
        return folder / name

    return download, asked


@pytest.fixture
def wide_vit(new_vit):
    """Heads of 64, as files without rotary periods are taken to have."""
    return new_vit(embed_dim=64, num_heads=1)


def test_pulled_weights_are_imported_and_the_download_removed(wide_vit, folder, images):
    download, asked = serve(wide_vit)
    card = pull_weights("dinov3_vits16", folder, download=download)
    repository = "timm/vit_small_patch16_dinov3.lvd1689m"
    assert asked == [(repository, "model.safetensors"), (repository, "config.json")]
    assert (card.name, card.source, card.licence) == ("dinov3_vits16", repository, "DINOv3 License")
    loaded, _ = load_backbone("dinov3_vits16", weights_folder=folder)
    torch.testing.assert_close(loaded(images).maps[-1], wide_vit(images).maps[-1], rtol=0, atol=2e-6)
    assert not list(folder.glob(".download/*"))
    assert pull_weights("dinov3_vits16", folder, download=download) == card
    assert len(asked) == 2  # nothing was fetched twice


def test_any_repository_can_be_pulled(wide_vit, folder):
    download, asked = serve(wide_vit)
    assert pull_weights("somebody/my-dinov3", folder, download=download).name == "my-dinov3"
    assert asked[0] == ("somebody/my-dinov3", "model.safetensors")


def test_a_failed_download_says_how_to_do_it_by_hand(folder):
    def download(repository, name, folder):
        raise OSError("401 Client Error\nfor url")

    with pytest.raises(ResourceError) as caught:
        pull_weights("dinov3_vitb16", folder, download=download)
    text = str(caught.value)
    assert "could not be fetched (OSError: 401 Client Error)" in text
    assert "https://huggingface.co/timm/vit_base_patch16_dinov3.lvd1689m/resolve/main/model.safetensors" in text
    assert "voxdino weights import FILE" in text
    assert list_weights(folder) == ()


def test_a_damaged_download_leaves_nothing_under_the_final_name(wide_vit, folder):
    whole, _ = serve(wide_vit)

    def download(repository, name, folder):
        path = whole(repository, name, folder)
        path.write_bytes(path.read_bytes()[:-7] if name != "config.json" else path.read_bytes())
        return path

    with pytest.raises(WeightsError, match="is cut off or damaged"):
        pull_weights("dinov3_vits16", folder, download=download)
    assert list_weights(folder) == ()
    assert not (folder / "dinov3_vits16.safetensors").exists()
    assert not list(folder.glob(".download/*"))


def test_the_hubs_own_client_fails_in_the_same_words(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match=r"^timm/vit_small_patch16_dinov3.lvd1689m: could not be fetched \("):
        pull_weights("dinov3_vits16", folder)


def test_names_the_hub_table_does_not_know_are_refused(folder):
    with pytest.raises(UsageError, match="Did you mean 'dinov3_vits16'"):
        pull_weights("dinov3_vit_s16", folder)


def test_every_backbone_of_the_table_has_a_copy_on_the_hub():
    assert set(BACKBONES) - set(hub.HUB_COPIES) == {"tiny", "none", "voxdino_tiny"}


def test_nothing_but_pull_connects(file, folder, monkeypatch):
    def deny(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "socket", deny)
    monkeypatch.setattr(socket, "create_connection", deny)
    import_weights(file, folder, "mine")
    load_backbone("mine", weights_folder=folder)
    list_weights(folder)


# Folders


def test_the_weights_folder_needs_no_home(monkeypatch, tmp_path):
    monkeypatch.setenv("VOXDINO_WEIGHTS", str(tmp_path / "w"))
    assert default_weights_folder() == tmp_path / "w"
    monkeypatch.delenv("VOXDINO_WEIGHTS")
    assert default_weights_folder().parts[-2:] == (".voxdino", "weights")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", no_home)
    assert default_weights_folder().name == "voxdino-weights"


def test_metadata_and_tensors_come_back_as_written(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(1).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"who": "me"})
    read, metadata = read_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(read[key], value) for key, value in load_file(tmp_path / "x.safetensors").items())
    assert metadata == {"who": "me"}
