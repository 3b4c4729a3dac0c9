"""Records: what is written is read back, and every mistake in a file or a setting is named by its key."""

import json
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from voxdino.core.errors import ConfigError, UsageError
from voxdino.core.records import Record, nearest


class Inner(Record):
    decoder: str = "linear"
    width: int = 8


class Outer(Record):
    name: str = "run"
    sizes: tuple[int, ...] = (1, 2)
    rate: float = 0.5
    mode: Literal["fast", "slow"] = "fast"
    folder: Path = Path("out")
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    by_index: dict[int, float] = Field(default_factory=dict)
    maybe: int | None = None


FULL = Outer(name="ü", sizes=(3,), many=(Inner(width=1), Inner()), by_index={2: 0.25}, maybe=4)


def test_what_is_written_is_read_back(tmp_path):
    FULL.write(tmp_path / "a.json")
    assert Outer.read(tmp_path / "a.json") == FULL
    assert Outer.from_json(FULL.to_json()) == FULL
    assert Outer.read(tmp_path / "a.json").digest() == FULL.digest()
    assert FULL.digest() != Outer().digest()


def test_a_file_may_leave_out_what_has_a_default():
    assert Outer.from_json({}) == Outer()


def test_records_are_frozen():
    with pytest.raises(ValidationError):
        FULL.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"nmae": "x"}, ["unknown key 'nmae'", "Did you mean 'name'?", "known keys: name, sizes"]),
        ({"inner": {"decodr": "x"}}, ["unknown key 'inner.decodr'", "Did you mean 'decoder'?", "decoder, width"]),
        ({"many": [{}, {"widht": 1}]}, ["unknown key 'many.1.widht'", "Did you mean 'width'?"]),
        ({"sizes": "1"}, ["'sizes' is \"1\"", "valid array"]),
        ({"sizes": [1.5]}, ["'sizes.0' is 1.5", "valid integer"]),
        ({"rate": "0.5"}, ["'rate' is \"0.5\"", "valid number"]),
        ({"name": 3}, ["'name' is 3", "valid string"]),
        ({"mode": "quick"}, ["'mode' is \"quick\"", "'fast' or 'slow'"]),
        ({"sizes": [True]}, ["'sizes.0' is true"]),
        ([], ["should be an object"]),
    ],
)
def test_a_mistake_in_a_file_is_named_by_its_key(tmp_path, value, words):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ConfigError) as caught:
        Outer.read(path)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    for word in [str(path), *words, "Fix: "]:
        assert word in message
    assert "\n" not in message


def test_a_missing_key_is_named():
    class Needy(Record):
        plan: str

    with pytest.raises(ConfigError, match="key 'plan' is missing"):
        Needy.from_json({}, where="run.json")


def test_nan_is_no_value():
    with pytest.raises(ValidationError, match="finite"):
        Outer(rate=float("nan"))


def test_settings_are_json_where_they_parse_and_text_elsewhere():
    settings = {"name": "3", "sizes": "[4,5]", "inner.decoder": "tpa_sad", "many.1.width": "7", "maybe": "null"}
    changed = FULL.with_settings(settings)
    assert changed.name == "3"
    assert changed.sizes == (4, 5)
    assert changed.inner.decoder == "tpa_sad"
    assert changed.many == (Inner(width=1), Inner(width=7))
    assert changed.maybe is None
    assert FULL.name == "ü"
    assert FULL.with_settings({}) == FULL


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nmae": "x"}, ["no setting 'nmae'", "Did you mean 'name'?"]),
        ({"inner.widht": "1"}, ["no setting 'inner.widht'", "Did you mean 'width'?", "decoder, width"]),
        ({"many.9.width": "1"}, ["no setting 'many.9'", "0 to 1"]),
        ({"name.x": "1"}, ["'name' is a single value"]),
        ({"inner.width": "wide"}, ["'inner.width' is \"wide\"", "valid integer"]),
        ({"rate": "[1"}, ["'rate' is \"[1\"", "valid number"]),
    ],
)
def test_a_wrong_setting_is_wrong_use(settings, words):
    with pytest.raises(UsageError) as caught:
        FULL.with_settings(settings)
    assert caught.value.exit_code == 2
    for word in [*words, "Fix: "]:
        assert word in str(caught.value)


def test_the_nearest_name_is_offered_only_when_near():
    assert nearest("decodr", ["encoder", "decoder"]) == " Did you mean 'decoder'?"
    assert nearest("zzz", ["encoder", "decoder"]) == ""
