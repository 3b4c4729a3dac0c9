"""`voxdino weights export` writes what other libraries read, and says what they inherit."""

import json

import pytest

from voxdino.cli import main


@pytest.mark.parametrize(
    "layout, files",
    [
        ("official", ["README.md", "random-tiny.pth"]),
        ("huggingface", ["README.md", "config.json", "model.safetensors"]),
        ("timm", ["README.md", "model.safetensors"]),
    ],
)
def test_a_backbone_is_exported_and_imported_again(tmp_path, capsys, layout, files):
    out = tmp_path / "out"
    assert main(["weights", "export", "random:tiny", "--layout", layout, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert f"in the {layout} layout" in shown.out and "licence none (random weights)" in shown.err
    assert sorted(path.name for path in out.iterdir()) == files
    command = ["weights", "import", str(out / files[-1]), "--name", "again", "--weights-folder", str(tmp_path / "w")]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["num_heads"] == 2


@pytest.mark.parametrize(
    "name, layout, code, words",
    [
        ("random:tiny", "hugingface", 2, "Did you mean 'huggingface'"),
        ("nobody", "official", 3, "no file and no imported weights of this name"),
        ("none", "official", 3, "has no place for a none"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, capsys, monkeypatch, name, layout, code, words):
    monkeypatch.setenv("VOXDINO_WEIGHTS", str(tmp_path / "weights"))
    assert main(["weights", "export", name, "--layout", layout, "--out", str(tmp_path / "out")]) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["weights", "export", "random:tiny", "--layout", "timm", "--out", str(tmp_path), "--json"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
