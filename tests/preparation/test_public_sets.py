"""Public data sets: fetched from a server on loopback, resumed, checked, unpacked inside their folder or refused."""

import errno
import hashlib
import io
import re
import shutil
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from voxdino.core.archives import UNPACKING, extract_tar
from voxdino.core.download import download, require_safe
from voxdino.core.errors import ImageError, ResourceError, SafetyError, UsageError
from voxdino.core.safe_files import TEMPORARY_PREFIX
from voxdino.preparation import public_sets
from voxdino.preparation.classification import ClassNames
from voxdino.preparation.public_sets import PUBLIC_SETS, PublicSet, pull_set

CONTENT = bytes(range(256)) * 40
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


class Server(ThreadingHTTPServer):
    """files: path -> body. cut: bytes after which the connection breaks. raw: all that it answers."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.cut, self.ranges, self.endless = {}, [], None, True, False
        self.raw = None

    def url(self, path):
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        body, asked = self.server.files.get(self.path[1:]), self.headers.get("Range")
        self.server.asked.append(asked)
        if self.server.raw is not None:
            self.close_connection = True
            return self.wfile.write(self.server.raw)
        if isinstance(body, str):
            self.send_response(302)
            self.send_header("Location", body)
            return self.end_headers()
        if body is None:
            return self.send_error(404)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.server.ranges else 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if not self.server.endless:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : start + self.server.cut if self.server.cut else None])
        self.close_connection = True


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.files["set.bin"] = CONTENT
        yield running
        running.shutdown()
        thread.join()


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member, body in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_a_file_arrives_whole_and_is_kept(server, tmp_path):
    path = tmp_path / "new" / "set.bin"
    told = []
    found = download(server.url("set.bin"), path, digest=MD5, max_bytes=10**6, on_progress=lambda *n: told.append(n))
    assert (found, path.read_bytes()) == (MD5, CONTENT) and told[-1] == (len(CONTENT), len(CONTENT))
    assert download(server.url("set.bin"), path, digest=MD5, max_bytes=10**6) == MD5
    assert server.asked == [None] and [one.name for one in path.parent.iterdir()] == ["set.bin"]
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match="is there already, and is another file"):
        download(server.url("set.bin"), path, digest=MD5, max_bytes=10**6)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("ranges", [True, False], ids=["with ranges", "without"])
def test_a_broken_download_goes_on_where_it_ended(server, tmp_path, ranges):
    server.cut, server.ranges = 3000, ranges
    path = tmp_path / "set.bin"
    with pytest.raises(ResourceError, match=r"broke off after 3000 of 10240 bytes.*run the same command again"):
        download(server.url("set.bin"), path, digest=MD5, max_bytes=10**6)
    assert not path.exists() and (tmp_path / "set.bin.part").stat().st_size == 3000
    server.cut = None
    assert download(server.url("set.bin"), path, digest=MD5, max_bytes=10**6) == MD5
    assert server.asked == [None, "bytes=3000-"] and path.read_bytes() == CONTENT


def test_a_part_that_is_whole_already_is_taken_and_one_that_is_too_long_is_not(server, tmp_path):
    for name, body in (("whole", CONTENT), ("long", CONTENT + b"more")):
        (tmp_path / f"{name}.part").write_bytes(body)
        assert download(server.url("set.bin"), tmp_path / name, digest=MD5, max_bytes=10**6) == MD5
        assert (tmp_path / name).read_bytes() == CONTENT


def test_a_digest_that_is_not_known_is_told(server, tmp_path):
    expected = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    assert download(server.url("set.bin"), tmp_path / "set", digest=None, max_bytes=10**6) == expected


@pytest.mark.parametrize("endless", [True, False], ids=["not announced", "announced"])
def test_other_contents_and_too_many_bytes_leave_nothing(server, tmp_path, endless):
    server.endless = endless
    for digest, limit, words in (("md5:00", 10**6, "not the file that was published"), (MD5, 5000, "more than")):
        with pytest.raises(SafetyError, match=words):
            download(server.url("set.bin"), tmp_path / "set", digest=digest, max_bytes=limit)
        assert list(tmp_path.iterdir()) == []


def test_only_https_leaves_this_machine(server, tmp_path):
    server.files["away"] = "http://example.org/set.bin"
    with pytest.raises(SafetyError, match=r"example\.org/set\.bin: is http, which anybody"):
        download(server.url("away"), tmp_path / "set", digest=None, max_bytes=10**6)
    for url in ("http://example.org/x", "ftp://127.0.0.1/x", "file:///etc/passwd", "http://127.0.0.1.example.org/x"):
        with pytest.raises(SafetyError, match="use https"):
            require_safe(url)


def test_a_missing_file_and_a_dead_server_say_so(server, tmp_path):
    with pytest.raises(ResourceError, match="the server says 404"):
        download(server.url("nothing"), tmp_path / "set", digest=None, max_bytes=10**6)
    with pytest.raises(ResourceError, match="the download broke off"):
        download("http://127.0.0.1:9/set", tmp_path / "set", digest=None, max_bytes=10**6)


@pytest.mark.parametrize(
    "answer",
    [
        b"this is no HTTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: -7\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70000 + b"\r\n\r\n",
    ],
    ids=["status", "words", "negative", "chunks", "header"],
)
def test_a_server_that_talks_nonsense_is_named(server, tmp_path, answer):
    server.raw = answer
    with pytest.raises(ResourceError, match=r"broke off|the server says"):
        download(server.url("set.bin"), tmp_path / "set", digest=MD5, max_bytes=10**6)
    assert not (tmp_path / "set").exists()


def test_a_tar_file_is_unpacked_without_the_droppings_of_macs(tmp_path):
    (tmp_path / "a.tar").write_bytes(
        tar_of([("Task/images/._a.nii", b"x"), ("Task/images/a.nii", b"scan"), ("b", b"")])
    )
    assert extract_tar(tmp_path / "a.tar", tmp_path / "out", max_bytes=100) == 2
    found = {one.relative_to(tmp_path / "out").as_posix() for one in (tmp_path / "out").rglob("*") if one.is_file()}
    assert found == {"Task/images/a.nii", "b"}


@pytest.mark.parametrize(
    "members, words",
    [
        ([("../outside", b"x")], "leads out of its folder"),
        ([("a/../../outside", b"x")], "leads out of its folder"),
        ([("/outside", b"x")], "leads out of its folder"),
        ([("C:outside", b"x")], "leads out of its folder"),
        ([("..\\outside", b"x")], "leads out of its folder"),
        ([(special("link", tarfile.SYMTYPE, "/etc"), b"")], "is no plain file"),
        ([("a", b"x"), (special("hard", tarfile.LNKTYPE, "a"), b"")], "is no plain file"),
        ([(special("pipe", tarfile.FIFOTYPE), b"")], "is no plain file"),
        ([(special("device", tarfile.CHRTYPE), b"")], "is no plain file"),
        ([("a", b"x"), ("A", b"y")], "holds 'A' twice"),
        ([("a", b"x" * 101)], "more than 100000 files or 100 bytes"),
    ],
)
def test_hostile_archives_leave_nothing(tmp_path, members, words):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "bad.tar"
    path.write_bytes(tar_of([("good", b"1"), *members]))
    with pytest.raises(SafetyError, match=words):
        extract_tar(path, tmp_path / "in" / "out", max_bytes=100)
    assert [one.name for one in (tmp_path / "in").iterdir()] == ["bad.tar"] and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_archive_leaves_nothing(tmp_path):
    path = tmp_path / "cut.tar"
    path.write_bytes(tar_of([("a", b"x" * 5000)])[:2000])
    with pytest.raises(ImageError, match="is no whole tar file"):
        extract_tar(path, tmp_path / "out", max_bytes=10**6)
    assert [one.name for one in tmp_path.iterdir()] == ["cut.tar"]


def published(server, name, body, classes=None):
    server.files[name] = body
    return PublicSet(
        url=server.url(name),
        checksum=f"md5:{hashlib.md5(body).hexdigest()}",
        licence="CC BY 4.0",
        about="small",
        source="a paper",
        task="segmentation",
        max_gib=0.001,
        classes=classes,
    )


def test_a_set_is_pulled_after_its_licence_is_accepted(server, tmp_path, monkeypatch):
    body = tar_of([("Task99/dataset.json", b"{}"), ("Task99/imagesTr/a.nii.gz", b"scan")])
    monkeypatch.setitem(public_sets.PUBLIC_SETS, "small", published(server, "Task99.tar", body))
    with pytest.raises(UsageError, match=r"small: is published under CC BY 4\.0 by a paper.*--accept-licence"):
        pull_set("small", tmp_path / "data", accept_licence=False)
    assert not (tmp_path / "data").exists() and server.asked == []
    found = pull_set("small", tmp_path / "data", accept_licence=True)
    assert (found.path, found.num_files) == (str(tmp_path / "data" / "Task99"), 2)
    assert pull_set("small", tmp_path / "data", accept_licence=True) == found and len(server.asked) == 1
    with pytest.raises(UsageError, match=r"unknown data set 'smal'\. Did you mean 'small'"):
        pull_set("smal", tmp_path, accept_licence=True)


@pytest.mark.parametrize("killed_in", ["rename", "rmdir"])
def test_a_kill_while_a_set_is_lifted_is_mended(server, tmp_path, monkeypatch, killed_in):
    body = tar_of([("Task99/dataset.json", b"{}"), ("Task99/imagesTr/a.nii.gz", b"scan")])
    monkeypatch.setitem(public_sets.PUBLIC_SETS, "small", published(server, "Task99.tar", body))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        whole = getattr(Path, killed_in)

        def kill(self, *rest):
            if "unpacked" in self.parts[-1] or "unpacked" in self.parts[-2]:
                raise KeyboardInterrupt
            return whole(self, *rest)

        patch.setattr(Path, killed_in, kill)
        pull_set("small", tmp_path, accept_licence=True)
    assert (tmp_path / "Task99.unpacked").is_dir()
    (tmp_path / f"{TEMPORARY_PREFIX}abc{UNPACKING}" / "content").mkdir(parents=True)
    assert pull_set("small", tmp_path, accept_licence=True).num_files == 2
    assert sorted(one.name for one in tmp_path.iterdir() if one.name != ".lock") == ["Task99", "Task99.tar"]


def test_a_full_disk_is_no_damaged_archive(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(tar_of([("a", b"scan")]))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        extract_tar(tmp_path / "a.tar", tmp_path / "out", max_bytes=100)
    assert [one.name for one in tmp_path.iterdir()] == ["a.tar"]


def test_the_order_of_grades_comes_with_the_set(server, tmp_path, monkeypatch):
    classes = ClassNames(kind="ordinal", classes=("0", "1", "2"))
    monkeypatch.setitem(public_sets.PUBLIC_SETS, "grades", published(server, "grades.npz", CONTENT, classes))
    found = pull_set("grades", tmp_path, accept_licence=True)
    assert found.path.endswith("grades.npz") and ClassNames.read(tmp_path / "grades.json") == classes


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_every_published_set_has_a_safe_address_a_digest_and_a_licence(name):
    found = PUBLIC_SETS[name]
    require_safe(found.url)
    assert re.fullmatch(r"md5:[0-9a-f]{32}", found.checksum) and found.licence.startswith("CC BY")
    assert sum(found.checksum == other.checksum for other in PUBLIC_SETS.values()) == 1
