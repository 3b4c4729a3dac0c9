"""Records: frozen, checked values that live in JSON files. An unknown key is an error with the nearest known name."""

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from os import PathLike
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from voxdino.core.errors import ConfigError, UsageError
from voxdino.core.safe_files import digest_json, read_json, write_json

R = TypeVar("R", bound="Record")  # not typing.Self: the checks of the tests see methods without their class

_MAX_PROBLEMS = 5  # problems named in one message


def nearest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'decoder'?", or "" when no known name is near."""
    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


class Record(BaseModel):
    """A value of a JSON file. Types are strict: "3" is no number, 1 is no truth value; NaN must be None."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def read(cls: type[R], path: str | PathLike[str]) -> R:
        """The record in a file. Errors: ConfigError naming file, key and what was found."""
        return cls.from_json(read_json(path), where=path)

    @classmethod
    def from_json(cls: type[R], value: Any, *, where: str | PathLike[str] | None = None) -> R:
        """The record of a parsed JSON value, types strictly checked. Errors: ConfigError."""
        try:
            return cls.model_validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            raise ConfigError(_explain(cls, error), where=where, fix=_remedy(cls, error)) from None

    def to_json(self) -> Any:
        """The value that `write` stores."""
        return self.model_dump(mode="json")

    def write(self, path: str | PathLike[str]) -> None:
        """Write the record atomically as JSON."""
        write_json(path, self.to_json())

    def digest(self) -> str:
        """SHA-256 of the content; two records with equal fields have equal digests."""
        return digest_json(self.to_json())

    def with_settings(self: R, settings: Mapping[str, str]) -> R:
        """A copy with `{"decoder.width": "128"}` applied: values are JSON where they parse as JSON, else text.

        Errors: UsageError for an unknown key (with the nearest known one) or a value of the wrong type.
        """
        value = self.to_json()
        texts: dict[tuple[str, ...], str] = {}
        for key, text in settings.items():
            path = tuple(key.split("."))
            _replace(value, path, _parse(text))
            texts[path] = text
        try:
            return type(self).model_validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            wanted_text = [
                path
                for problem in error.errors()
                if (path := _path(problem["loc"])) in texts and problem["type"] == "string_type"
            ]
            if not wanted_text:
                raise UsageError(_explain(type(self), error), where="--set", fix=_remedy(type(self), error)) from None
        for path in wanted_text:  # `--set name=3` where the name is a text
            _replace(value, path, texts[path])
        try:
            return type(self).model_validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            raise UsageError(_explain(type(self), error), where="--set", fix=_remedy(type(self), error)) from None


def _path(loc: tuple[int | str, ...]) -> tuple[str, ...]:
    return tuple(str(part) for part in loc)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _replace(value: Any, path: tuple[str, ...], new: Any) -> None:
    """Put `new` at `path` of nested dicts and lists."""
    for depth, part in enumerate(path):
        here = ".".join(path[: depth + 1])
        if isinstance(value, list):
            if not (part.isascii() and part.isdigit() and int(part) < len(value)):
                fix = f"use a position from 0 to {len(value) - 1}." if value else "set the whole list."
                raise UsageError(f"no setting '{here}'.", where="--set", fix=fix)
            index: Any = int(part)
        elif isinstance(value, dict):
            if part not in value:
                known = ", ".join(value) or "none"
                raise UsageError(f"no setting '{here}'.{nearest(part, value)}", where="--set", fix=f"known: {known}.")
            index = part
        else:
            above = ".".join(path[:depth])
            raise UsageError(f"no setting '{here}': '{above}' is a single value.", where="--set", fix=f"set '{above}'.")
        if depth + 1 == len(path):
            value[index] = new
        else:
            value = value[index]


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    told = [_explain_one(model, problem) for problem in problems[:_MAX_PROBLEMS]]
    if len(problems) > _MAX_PROBLEMS:
        told.append(f"and {len(problems) - _MAX_PROBLEMS} more problems.")
    return " ".join(told)


def _explain_one(model: type[BaseModel], problem: Any) -> str:
    loc = problem["loc"]
    key = ".".join(_path(loc))
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'.{nearest(str(loc[-1]), _known_keys(model, loc[:-1]))}"
    if problem["type"] == "missing":
        return f"the key '{key}' is missing."
    message = problem["msg"].removeprefix("Value error, ").rstrip(".")
    if not loc:
        return f"{message}."
    found = json.dumps(problem["input"], default=str, ensure_ascii=False)
    return f"'{key}' is {found if len(found) <= 60 else found[:57] + '...'}: {message[0].lower() + message[1:]}."


def _remedy(model: type[BaseModel], error: ValidationError) -> str:
    for problem in error.errors(include_url=False):
        if problem["type"] == "extra_forbidden":
            known = _known_keys(model, problem["loc"][:-1])
            if known:
                return f"known keys: {', '.join(known)}."
    return "correct the value."


def _known_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Keys of the record that lies at `loc` inside `model`."""
    models = [model]
    for part in loc:
        fields = [m.model_fields[part] for m in models if isinstance(part, str) and part in m.model_fields]
        if fields:
            models = [inner for field in fields for inner in _models_in(field.annotation)]
    return [name for m in models for name in m.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
