"""JSON that users give: read whole or refused with a sentence, however large, deep or strange it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .errors import HawqError, InputError

BYTES, DEPTH = 2**26, 100


def read_json(path: str | Path, what: str, error: type[HawqError] = InputError) -> Any:
    """The contents of a JSON file; what: it should be, for the errors.

    Raises `error` when it cannot be read, is no JSON, or is larger or nested deeper than any such file.
    """
    place, where = Path(path), str(path)
    try:
        if place.exists() and not place.is_file():
            raise error(
                "is no file", where=where, expected=what, found="a folder" if place.is_dir() else "a device or pipe"
            )
        if place.stat().st_size > BYTES:
            raise error(
                "is too large",
                where=where,
                expected=f"{what}, of at most {BYTES:,} bytes",
                found=f"{place.stat().st_size:,}",
            )
        data = place.read_bytes()
    except OSError as e:
        raise error(
            "cannot be read", where=where, expected=what, found=e.strerror or str(e), remedy="check the path"
        ) from e
    except ValueError as e:  # a path that no file can have
        raise error("cannot be read", where=f"{where!r:.60}", expected=what, found=str(e)) from e
    return parse_json(data, where, what, error)


def parse_json(data: bytes | str, where: str, what: str, error: type[HawqError] = InputError) -> Any:
    """The value that JSON text means.

    Raises `error` when it is none, or nested deeper than any such file.
    """
    deep = error("is nested too deeply", where=where, expected=what, found=f"more than {DEPTH} levels")
    try:
        value = json.loads(data)
    except RecursionError as e:
        raise deep from e
    except ValueError as e:  # no JSON, no UTF-8, or a number of absurd length
        raise error("is no JSON", where=where, expected=what, found=str(e).splitlines()[0]) from e
    level, depth = [value], 0
    while level:  # what is printed of it, or walked through, recurses
        level = [
            inner
            for one in level
            if isinstance(one, list | dict)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        depth += 1
        if depth > DEPTH:
            raise deep
    return value


def clipped(value: Any) -> str:
    """A value for an error, of 60 characters at most."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def number(value: Any) -> float | None:
    """A finite number that JSON held; None for anything else, such as a boolean, NaN or an integer beyond floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
