"""The log survives a cut line and rewinds; the picture is drawn for any beginning of a run; progress goes to stderr."""

import pytest

from voxdino.core.errors import CheckpointError
from voxdino.training.tracking import Event, RunLog, draw_curves, show_progress

ROWS = [
    {"step": 1, "loss": 1.5, "lr_factor": 0.1},
    {"step": 2, "loss": None, "skipped": True},
    {"step": 3, "loss": 1.2, "lr_factor": 0.2},
    {"step": 3, "dice": 0.4, "per_class": {"liver": 0.8, "lesion": None}},
    {"step": 4, "loss": 1.1, "lr_factor": 0.3},
]


def test_rows_come_back_and_a_cut_line_does_not(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    assert log.rows() == []
    for row in ROWS:
        log.append(row)
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert log.rows() == ROWS


def test_rewinding_forgets_what_came_later_and_keeps_the_bytes_of_the_rest(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    for row in ROWS[:4]:
        log.append(row)
    before = log.path.read_bytes()
    log.append(ROWS[4])
    log.rewind(3, validated_step=3)
    assert log.path.read_bytes() == before


def test_rewinding_forgets_a_validation_that_the_checkpoint_does_not_know(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    for row in ROWS:
        log.append(row)
    log.rewind(3, validated_step=-1)
    assert log.rows() == ROWS[:3]


@pytest.mark.parametrize(
    "line", [b"garbage\n", b"[]\n", b"{}\n", b'{"step": "3"}\n', b'{"step": 3, "dice": 1}\n', b"\xff\n"]
)
def test_a_damaged_line_is_named_and_can_go(tmp_path, line):
    log = RunLog(tmp_path / "log.jsonl")
    log.append(ROWS[0])
    with log.path.open("ab") as file:
        file.write(line)
    log.append(ROWS[2])
    with pytest.raises(CheckpointError, match=r"log\.jsonl: line 2 is damaged.*delete this line"):
        log.rewind(3, validated_step=3)


@pytest.mark.parametrize("number", range(1, len(ROWS) + 1))
def test_the_picture_can_be_drawn_at_any_moment(tmp_path, number):
    draw_curves(ROWS[:number], tmp_path / "curves.png", title="run")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_progress_goes_to_stderr_only(capsys):
    with show_progress() as listen:
        listen(Event("step", "loss 1.2", 1, 2))
        listen(Event("note", "resumed at step 3"))
    shown = capsys.readouterr()
    assert shown.out == "" and "resumed at step 3" in shown.err


def test_a_listener_is_told_everything_and_nothing_is_shown(capsys):
    events = []
    with show_progress(events.append) as listen:
        listen(Event("note", "resumed"))
    assert [event.text for event in events] == ["resumed"]
    assert capsys.readouterr().err == ""
