"""Parses the command line of every script into a dataclass of arguments, with tyro.

Values come from the flags, else from ``--config file.yaml``, else from the defaults. Booleans accept ``--flag``,
``--flag 1`` and ``--flag true``, and so does a choice that has 0 and 1 among others, such as ``--compile``. Names are
written with underscores. ``script`` (from ``minillm.errors``) decorates ``main``.
"""

import contextlib
import dataclasses
import io
import os
import sys
from pathlib import Path
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

from minillm.cli.bare import choose, flag_value
from minillm.cli.help import format_help, program
from minillm.distributed.launcher import on_first_rank
from minillm.errors import UserError, after_the_first_rank
from minillm.errors import script as script

Arguments = TypeVar("Arguments")
_BOOLEANS = {"1": "True", "true": "True", "yes": "True", "0": "False", "false": "False", "no": "False"}


def parse(cls: type[Arguments], argv: list[str] | None = None) -> Arguments:
    """Return the arguments ``cls`` from ``argv`` (default: this process's), ``--config`` and the defaults.

    Raises:
        UserError: a configuration file that is missing, broken or has unknown fields; a value out of range.
        SystemExit: code 2 for a wrong flag (tyro prints the message), 0 for ``--help``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # DeepSpeed's launcher passes the local rank as a flag and in the environment.
    argv = [word for word in argv if not word.startswith("--local_rank=")]
    argv = [_as_text(word) for word in argv]
    if "--help" in argv or "-h" in argv:
        print(format_help(cls))
        raise SystemExit(0)
    argv, config_path = _take_config(argv)
    values = _read_yaml(cls, config_path) if config_path else {}
    stage = getattr(cls, "bare_stage", None)
    is_bare = stage and not values.get("data_path") and flag_value(argv, "data_path") is None
    argv = _spell_out_booleans(cls, argv)
    if is_bare:
        _fill(cls, argv, _with_defaults(cls, values, missing=""))  # reports a wrong flag before anything is written
        values = _checked(cls, choose(stage, argv, values) | values, where="the demo's settings")
    default = _with_defaults(cls, values) if config_path or is_bare else None
    arguments = _fill(cls, argv, default)
    if hasattr(arguments, "check"):
        arguments.check()
    return arguments


def _fill(cls: type[Arguments], argv: list[str], default: Arguments | None) -> Arguments:
    # A usage error is the same on all ranks: only the first one prints it.
    quiet_other_ranks = contextlib.nullcontext() if on_first_rank() else contextlib.redirect_stderr(io.StringIO())
    settings = {"prog": program(), "use_underscores": True, "config": (tyro.conf.FlagConversionOff,)}
    try:
        with quiet_other_ranks:
            return tyro.cli(cls, args=argv, default=default, **settings)
    except SystemExit:
        after_the_first_rank()
        raise


def _as_text(word: str) -> str:
    """Return a word that the locale could not decode as UTF-8 text; names of existing files stay unchanged."""
    try:
        word.encode()
    except UnicodeEncodeError:
        if not os.path.exists(word):
            with contextlib.suppress(UnicodeDecodeError):
                return os.fsencode(word).decode("utf-8")
    return word


def _take_config(argv: list[str]) -> tuple[list[str], str | None]:
    rest, path, words = [], None, iter(argv)
    for word in words:
        if word == "--config":
            path = next(words, None)
            if path is None:
                raise UserError("--config needs a file name, e.g. --config configs/demo/pretrain.yaml")
        elif word.startswith("--config="):
            path = word.split("=", 1)[1]
        else:
            rest.append(word)
    return rest, path


def _read_yaml(cls: type[Arguments], path: str) -> dict:
    if not os.path.isfile(path):
        raise UserError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not UTF-8 text (byte {error.start})") from error
    except Exception as error:  # not only YAMLError: the library raises others for some invalid values
        raise UserError(f"--config {path}: not valid YAML ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: must hold 'name: value' lines, not {type(values).__name__}")
    if "command" in values and isinstance(values.get("arguments"), dict):
        values = values["arguments"]  # the run.yaml of a run
    return _checked(cls, values, where=f"--config {path}")


def _checked(cls: type[Arguments], values: dict, *, where: str) -> dict:
    """Return ``values`` converted to the types of the fields of ``cls``; UserError for unknown names, wrong types."""
    types = get_type_hints(cls)
    unknown_names = sorted(map(str, set(values) - set(types)))
    if unknown_names:
        raise UserError(f"{where}: unknown field {', '.join(unknown_names)}; known: {', '.join(sorted(types))}")
    return {name: _to_type(f"{where}: {name}", value, types[name]) for name, value in values.items()}


def _with_defaults(cls: type[Arguments], values: dict, *, missing=tyro.MISSING) -> Arguments:
    """Return ``cls`` with ``values``; fields without a default get ``missing``, so that tyro requires their flags."""
    values = dict(values)
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            values[field.name] = missing
    return cls(**values)


def _to_type(where: str, value, kind):
    """Convert a YAML value to the type of its field, or refuse it: YAML reads ``1e-3`` as a string, ``1`` as an int."""
    if type(None) in get_args(kind):  # such as int | None
        if value is None:
            return None
        kind = next(choice for choice in get_args(kind) if choice is not type(None))
    if kind in (int, float):
        try:
            converted = kind(value)
        except (TypeError, ValueError, OverflowError):
            converted = None
        is_rounded = kind is int and isinstance(value, float) and converted != value
        if converted is None or isinstance(value, bool) or is_rounded:
            raise UserError(f"{where}: {value!r} is not of type {kind.__name__}")
        return converted
    if kind is bool and not isinstance(value, bool):
        raise UserError(f"{where}: {value!r} is not true or false")
    if kind is str and not isinstance(value, str):
        raise UserError(f"{where}: {value!r} is not a string (quote it)")
    if _is_switch(kind) and isinstance(value, int):  # true and false, or 0 and 1, as YAML reads them
        value = str(int(value))
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise UserError(f"{where}: {value!r} is not one of {', '.join(map(str, get_args(kind)))}")
    return value


def _is_switch(kind) -> bool:
    """Return whether a field is 0, 1 or something else, such as auto."""
    return get_origin(kind) is Literal and {"0", "1"} <= set(get_args(kind))


def _spell_out_booleans(cls, argv: list[str]) -> list[str]:
    """Return ``argv`` with every boolean flag as ``--flag True`` or ``--flag False``, as tyro expects it.

    A flag whose choices include 0 and 1 gets those.
    """
    kinds = get_type_hints(cls)
    booleans = {name for name, kind in kinds.items() if kind in (bool, bool | None) or _is_switch(kind)}
    words, spelled = list(argv), []
    while words:
        word = words.pop(0)
        name, _, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in booleans:
            spelled.append(word)
            continue
        if not value and words and not words[0].startswith("--"):
            value = words.pop(0)
        value = _BOOLEANS.get(value.lower(), value) if value else "True"
        if _is_switch(kinds[name]):
            value = {"True": "1", "False": "0"}.get(value, value)
        spelled += [f"--{name}", value]
    return spelled


def require(condition: bool, message: str) -> None:
    """Raise ``UserError(message)`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)
