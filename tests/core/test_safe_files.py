"""Final files are whole or absent; damage, locks, full disks and escapes are named."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from voxdino.core import safe_files
from voxdino.core.errors import CheckpointError, ConfigError, ImageError, InputError, ResourceError, SafetyError
from voxdino.core.safe_files import (
    TEMPORARY_PREFIX,
    Manifest,
    digest_bytes,
    digest_file,
    digest_json,
    format_bytes,
    read_json,
    require_file,
    require_free_space,
    require_inside,
    sweep_temporary,
    write_atomic,
    write_bytes,
    write_json,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_written_file_is_there_whole_and_alone(tmp_path):
    write_bytes(tmp_path / "new" / "a.bin", b"abc")
    write_text(tmp_path / "new" / "ä.txt", "ü")
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"abc"
    assert (tmp_path / "new" / "ä.txt").read_bytes() == "ü".encode()
    assert names(tmp_path / "new") == ["a.bin", "ä.txt"]


def test_the_temporary_name_keeps_the_suffixes_and_the_folder(tmp_path):
    with write_atomic(tmp_path / "case.v1.nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz")
        assert temporary.name.startswith(TEMPORARY_PREFIX)
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"x")
        assert not (tmp_path / "case.v1.nii.gz").exists()


def test_the_new_file_takes_the_name_and_never_writes_into_the_old_one(tmp_path):
    write_bytes(tmp_path / "a.bin", b"old")
    (tmp_path / "kept").hardlink_to(tmp_path / "a.bin")
    write_bytes(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert (tmp_path / "kept").read_bytes() == b"old"


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    write_bytes(tmp_path / "a.bin", b"old")
    with pytest.raises(KeyError), write_atomic(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"half")
        raise KeyError("stop")
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_files_take_their_mode_from_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a.bin", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "disk is full"),
        (errno.EROFS, "cannot be written"),
        (errno.EACCES, "cannot be written"),
        (errno.EIO, "could not be written"),
    ],
)
def test_what_the_disk_refuses_is_a_resource_error_with_the_file(tmp_path, number, words):
    with pytest.raises(ResourceError, match=words) as caught, write_atomic(tmp_path / "a.bin"):
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == 4
    assert str(tmp_path / "a.bin") in str(caught.value)
    assert "Fix: " in str(caught.value)
    assert names(tmp_path) == []


def test_a_failed_fsync_is_not_taken_for_success(tmp_path, monkeypatch):
    write_bytes(tmp_path / "a.bin", b"old")

    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(safe_files.os, "fsync", fail)
    with pytest.raises(ResourceError, match="could not be written"):
        write_bytes(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_full_disk_is_recognised_behind_any_error_of_a_foreign_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_files, "_free_bytes", lambda _: 10)
    with pytest.raises(ResourceError, match=r"disk is full \(10 bytes free\)"), write_atomic(tmp_path / "a.bin"):
        raise RuntimeError("unexpected pos 448 vs 342")


def test_a_folder_that_cannot_be_made_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ResourceError):
        write_bytes(tmp_path / "file" / "a.bin", b"x")


def test_json_is_written_for_people_and_never_holds_nan(tmp_path):
    write_json(tmp_path / "a.json", {"name": "Ödem", "list": [1, 2.5, None]})
    assert '"name": "Ödem"' in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"name": "Ödem", "list": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert read_json(tmp_path / "a.json")["name"] == "Ödem"


def test_reading_json_names_what_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="is a folder"):
        read_json(tmp_path)
    (tmp_path / "a.json").write_text('{"a": 1,}')
    with pytest.raises(ConfigError, match=r"a\.json: line 1, column 8: a trailing comma"):
        read_json(tmp_path / "a.json")


def odd_file(folder: Path, kind: str) -> Path:
    path = folder / "odd"
    match kind:
        case "an empty file":
            path.touch()
        case "a folder":
            path.mkdir()
        case "a named pipe":
            os.mkfifo(path)
        case "a device":
            path.symlink_to("/dev/zero")
        case "a symbolic link to a file that does not exist":
            path.symlink_to(folder / "nowhere")
        case "cannot be opened":
            path.symlink_to(path)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "an empty file",
        "a folder",
        "a named pipe",
        "a device",
        "a symbolic link to a file that does not exist",
        "cannot be opened",
        "no such file",
    ],
)
def test_what_is_no_file_is_said_without_opening_it(tmp_path, kind):
    with pytest.raises(ImageError, match=kind) as caught:
        require_file(odd_file(tmp_path, kind), kind=ImageError)
    assert caught.value.exit_code == 3
    assert "Fix: " in str(caught.value)


def test_digests_are_sha256_and_ignore_key_order(tmp_path):
    write_bytes(tmp_path / "a", b"abc")
    assert digest_file(tmp_path / "a") == digest_bytes(b"abc")
    assert digest_bytes(b"abc").startswith("ba7816bf")
    assert digest_json({"a": 1, "b": [2]}) == digest_json({"b": [2], "a": 1})
    assert digest_json({"a": 1}) != digest_json({"a": 1.5})


def stray_name(pid, host=None):
    return f"{TEMPORARY_PREFIX}{host or safe_files._host_tag()}-{pid}-0123abcd.nii.gz"


def test_sweeping_takes_what_dead_writers_left_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (stray_name(dead.pid), stray_name(os.getpid()), stray_name(1), stray_name(7, "abcdef"), "a.nii.gz"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a.nii.gz").write_bytes(b"x")
    old = tmp_path / f"{TEMPORARY_PREFIX}abcdef-9-00000000"
    old.write_bytes(b"x")
    os.utime(old, (0, 0))
    with write_atomic(tmp_path / "b.nii.gz") as temporary:
        temporary.write_bytes(b"x")
        assert sweep_temporary(tmp_path) == 3  # the dead process's, this pid's from an earlier life, the old one
        assert temporary.exists()
    assert names(tmp_path) == sorted([stray_name(1), stray_name(7, "abcdef"), "a.nii.gz", "b.nii.gz"])


def test_a_killed_writer_leaves_the_old_file_and_a_stray_that_is_swept(tmp_path):
    write_bytes(tmp_path / "a.bin", b"old")
    code = (
        "import os, sys; from voxdino.core.safe_files import write_atomic\n"
        "with write_atomic(sys.argv[1]) as path: path.write_bytes(b'half'); os.kill(os.getpid(), 9)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.bin")], check=False)
    assert result.returncode == -9
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    assert sweep_temporary(tmp_path) == 1
    assert names(tmp_path) == ["a.bin"]


def test_free_space_is_asked_before_work_starts(tmp_path):
    require_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(ResourceError, match=r"1024\.0 TiB are needed, .* are free") as caught:
        require_free_space(tmp_path / "not" / "yet", 1 << 50)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "a/../../b", "link/x", "https://example.org/x", "../rootling"]
)
def test_paths_that_leave_their_root_are_refused(tmp_path, path):
    (tmp_path / "root").mkdir()
    (tmp_path / "rootling").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(SafetyError) as caught:
        require_inside(tmp_path / "root", path)
    assert caught.value.exit_code == 5


def test_paths_inside_are_resolved_and_external_ones_only_on_request(tmp_path):
    root = tmp_path.resolve()
    assert require_inside(root, "a/./b/../c") == root / "a" / "c"
    assert require_inside(root, root / "a") == root / "a"
    assert require_inside(root / "a", "../b", allow_external=True) == root / "b"
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(InputError, match="cannot be followed"):
        require_inside(tmp_path, "circle/x")


def written_manifest(folder):
    write_bytes(folder / "w.bin", b"weights")
    write_bytes(folder / "sub" / "c.json", b"{}")
    (folder / "empty").touch()
    Manifest.of(folder, ["w.bin", "sub/c.json", "empty"]).write(folder)
    return Manifest.read(folder)


def test_an_untouched_folder_verifies(tmp_path):
    manifest = written_manifest(tmp_path)
    manifest.verify(tmp_path)
    assert set(manifest.files) == {"w.bin", "sub/c.json", "empty"}


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"Weights", "checksum differs"), (b"weight", "6 bytes, 7 were written"), (None, "no such file")],
)
def test_a_changed_short_or_missing_file_is_named(tmp_path, data, words):
    manifest = written_manifest(tmp_path)
    if data is None:
        (tmp_path / "w.bin").unlink()
    else:
        (tmp_path / "w.bin").write_bytes(data)
    manifest.verify(tmp_path, ["sub/c.json"])
    with pytest.raises(CheckpointError, match=words) as caught:
        manifest.verify(tmp_path)
    assert "w.bin" in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_folder_without_manifest_was_never_completed(tmp_path):
    with pytest.raises(CheckpointError, match="never completed"):
        Manifest.read(tmp_path)
    write_json(tmp_path / "manifest.json", {"files": [1]})
    with pytest.raises(CheckpointError, match="not a manifest of ours"):
        Manifest.read(tmp_path)


def test_a_manifest_never_reads_outside_its_folder(tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    folder = tmp_path / "run"
    folder.mkdir()
    manifest = Manifest({"../secret": (digest_bytes(b"x"), 1)})
    with pytest.raises(SafetyError):
        manifest.verify(folder)


def test_sizes_are_printed_for_people():
    assert [format_bytes(n) for n in (0, 1023, 1536, 3 << 30, 5 << 42)] == [
        "0 bytes",
        "1023 bytes",
        "1.5 KiB",
        "3.0 GiB",
        "20.0 TiB",
    ]
