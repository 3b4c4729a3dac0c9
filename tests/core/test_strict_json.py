"""JSON that Python reads and we do not: each refusal names line and column."""

import pytest

from voxdino.core.errors import ConfigError
from voxdino.core.strict_json import parse_json


def test_plain_json_is_read_as_python_reads_it():
    text = '{"a": [1, -2.5e3, null, true, "ü\\n"], "b": {}}'
    assert parse_json(text.encode()) == {"a": [1, -2500.0, None, True, "ü\n"], "b": {}}
    assert parse_json(b"3") == 3


@pytest.mark.parametrize(
    ("data", "place", "words"),
    [
        (b"", "line 1, column 1", "empty"),
        (b" \n ", "line 1, column 1", "empty"),
        (b'\xef\xbb\xbf{"a": 1}', "line 1, column 1", "byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "line 1, column 1", "UTF-16"),
        ('{"a": 1}'.encode("utf-16-le"), "line 1, column 1", "UTF-16"),
        (b'{"a": "\xff"}', "line 1, column 8", "0xff is not UTF-8"),
        (b'{\n "a": 1,\n}', "line 2, column 8", "trailing comma before '}'"),
        (b"[1, 2,]", "line 1, column 6", "trailing comma before ']'"),
        (b'{\n // note\n "a": 1}', "line 2, column 2", "comment"),
        (b'{"a": 1 /* one */}', "line 1, column 9", "comment"),
        (b"{'a': 1}", "line 1, column 2", "single quotes"),
        (b'{"a": 1\n "b": 2}', "line 2, column 2", "expecting ',' delimiter"),
        (b'{"a": 1} x', "line 1, column 10", "extra data"),
        (b'{"a": 1,\n "b": {"c": 1,\n  "c": 2}}', "line 3, column 3", "'c' is given twice"),
        (b'{"a": "a", "a": 1}', "line 1, column 12", "'a' is given twice"),
        (b'{"a": NaN}', "line 1, column 7", "NaN"),
        (b'{"a": -Infinity}', "line 1, column 7", "Infinity"),
        (b'{"a": 1e999}', "line 1, column 7", "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1, column 7", "5000 digits"),
        (b"[" * 1000 + b"]" * 1000, "line 1, column 65", "deeper than 64"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "column", "deeper than 64"),
        (b"[" * 70 + b"]" * 70, "line 1, column 65", "deeper than 64"),
        (b'["' + b"\\", "line 1, column 2", "unterminated"),
    ],
)
def test_lenient_json_is_refused_with_line_and_column(data, place, words):
    with pytest.raises(ConfigError) as caught:
        parse_json(data, where="dataset.json")
    message = str(caught.value)
    assert message.startswith("dataset.json: ")
    assert place in message
    assert words in message
    assert "Fix: " in message
    assert "\n" not in message
    assert caught.value.exit_code == 3


def test_braces_and_keys_inside_texts_do_not_count():
    assert parse_json(b'[{"a": "}{[,NaN"}, {"a": 1}, {"b": ["a", "a"]}]')[2] == {"b": ["a", "a"]}
    with pytest.raises(ConfigError, match="column 19"):
        parse_json(b'{"x": "{\\"", "a": NaN}')
