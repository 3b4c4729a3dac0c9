"""JSON read without mercy: what Python's parser lets pass (BOM, NaN, duplicate keys ...) is an error with its place."""

import json
import math
import re
from os import PathLike
from typing import Any

from voxdino.core.errors import ConfigError

MAX_DEPTH = 64  # levels of nesting; our own records use fewer than ten
MAX_DIGITS = 32  # digits of one number

_PART = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')


class _RefusedError(ValueError):
    """Valid for Python's parser, not for us."""


def parse_json(data: bytes, *, where: str | PathLike[str] | None = None) -> Any:
    """The value of a JSON document. Errors: ConfigError naming line and column."""
    text = _decode(data, where)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_short,
        )
    except json.JSONDecodeError as error:
        fact, position = _explain(text, error)
        raise _at(text, position, fact, where) from None
    except (_RefusedError, RecursionError):
        fact, position = _find_refused(text)
        raise _at(text, position, fact, where) from None
    if _is_deep(value):
        fact, position = _find_refused(text)
        raise _at(text, position, fact, where)
    return value


def _decode(data: bytes, where: str | PathLike[str] | None) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]:
        raise ConfigError("line 1, column 1: the text is UTF-16 or UTF-32.", where=where, fix="save it as UTF-8.")
    if data.startswith(b"\xef\xbb\xbf"):
        raise ConfigError(
            "line 1, column 1: the file starts with a byte order mark.",
            where=where,
            fix="save it as UTF-8 without BOM.",
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        raise _at(before, len(before), f"byte 0x{data[error.start]:02x} is not UTF-8", where) from None


def _at(text: str, position: int, fact: str, where: str | PathLike[str] | None) -> ConfigError:
    line = text.count("\n", 0, position) + 1
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    return ConfigError(f"line {line}, column {column}: {fact}.", where=where, fix="correct the JSON there.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _RefusedError
    return value


def _refuse(literal: str) -> None:
    raise _RefusedError


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise _RefusedError
    return value


def _short(number: str) -> int:
    if len(number) > MAX_DIGITS:
        raise _RefusedError
    return int(number)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = (
            [
                item
                for container in level
                for item in (container.values() if isinstance(container, dict) else container)
                if isinstance(item, (dict, list))
            ]
            if isinstance(value, (dict, list))
            else []
        )
        if not level:
            return False
    return True


def _explain(text: str, error: json.JSONDecodeError) -> tuple[str, int]:
    """What is wrong at a syntax error, in the words of the person who made it."""
    position = error.pos
    before = text[:position].rstrip()
    rest = text[position:].lstrip()
    if not text.strip():
        return "the file is empty", 0
    if rest[:1] in ("}", "]") and before.endswith(","):
        return f"a trailing comma before '{rest[0]}'", len(before) - 1
    if rest[:1] == "," and rest[1:].lstrip()[:1] in ("}", "]"):
        return f"a trailing comma before '{rest[1:].lstrip()[0]}'", len(text) - len(rest)
    if rest.startswith(("//", "/*", "#")):
        return "a comment; JSON has none", len(text) - len(rest)
    if rest.startswith("'"):
        return "single quotes; JSON strings take double quotes", len(text) - len(rest)
    return error.msg[0].lower() + error.msg[1:], position


def _find_refused(text: str) -> tuple[str, int]:
    """The first duplicate key, NaN, huge number or too deep bracket of a text that is JSON otherwise."""
    keys: list[set[str] | None] = []  # per open bracket: the keys seen so far, None in a list
    previous = ""
    for match in _PART.finditer(text):
        part = match.group()
        if part in ("{", "["):
            keys.append(set() if part == "{" else None)
            if len(keys) > MAX_DEPTH:
                return f"nested deeper than {MAX_DEPTH} levels", match.start()
        elif part in ("}", "]"):
            keys.pop()
        elif part[0] == '"':
            known = keys[-1] if keys else None
            if known is not None and previous in ("{", ","):
                key = json.loads(part)
                if key in known:
                    return f"the key '{key}' is given twice", match.start()
                known.add(key)
        elif part in ("NaN", "Infinity", "-Infinity"):
            return f"{part} is no JSON number", match.start()
        elif len(part) > MAX_DIGITS and set(part) <= set("-0123456789"):
            return f"a number of {len(part)} digits", match.start()
        elif part[-1].isdigit() and not math.isfinite(float(part)):
            return f"the number {part[:MAX_DIGITS]} is too large", match.start()
        previous = part
    return "the text is no JSON that we can use", 0
