"""The JSON files of a package: read, and compared with package.schema.json and with what a schema cannot say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import fastjsonschema  # the schema's library that needs no other: hawq_tvm.runtime reads packages, too

from hawq_tvm.errors import PackageError

SCHEMA = Path(__file__).parent / "package.schema.json"
ELEMENT_BYTES = {"bool": 1, "float16": 2, "float32": 4, "float64": 8, **{f"{u}int{b}": b // 8 for u in ("", "u") for b in (8, 16, 32, 64)}}
MOST_BYTES = 1 << 40  # of an input or output: more than a machine has
REMEDY = "compile it again"


def read(data: bytes, what: str, where: str) -> Any:
    """The value of a JSON file; what: "manifest", "report" or "certificate".

    Raises PackageError when it is no JSON, which knows no NaN.
    """
    try:
        return json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as e:  # ValueError: no JSON, no UTF-8, or a number of absurd length
        raise PackageError(f"is damaged: its {what} is no JSON", where=where, found=str(e).splitlines()[0], remedy=REMEDY) from e


def checked(data: bytes, what: str, where: str) -> Any:
    """The value of a JSON file that fits the schema.

    Raises PackageError saying what does not.
    """
    value = read(data, what, where)
    fit(value, what, where)
    return value


def fit(value: Any, what: str, where: str) -> None:
    """Whether a value fits the schema of a manifest, report or certificate.

    Raises PackageError saying what does not.
    """
    try:
        _validator(what)(value)
    except fastjsonschema.JsonSchemaValueException as e:
        raise _foreign(what, where, e.message[:200]) from e
    if what == "manifest":
        _check_interface(value, where)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


@lru_cache(maxsize=4)
def _validator(what: str) -> Callable[[Any], Any]:
    schema = json.loads(SCHEMA.read_text())
    made: Callable[[Any], Any] = fastjsonschema.compile({"$schema": schema["$schema"], "definitions": schema["definitions"], "$ref": f"#/definitions/{what}"})
    return made


def _foreign(what: str, where: str, found: str) -> PackageError:
    return PackageError(f"has a {what} that another tool wrote", where=where, expected=SCHEMA.name, found=found, remedy=REMEDY)


def _check_interface(manifest: Mapping[str, Any], where: str) -> None:
    """Names once each, arrays that memory can hold, types and quantizations that fit them; integers, not 2.0, which JSON calls one, too."""
    for side in ("inputs", "outputs"):
        names = [e["name"] for e in manifest[side]]
        if len(set(names)) < len(names):
            raise _foreign("manifest", where, f"two {side} of the same name")
        for e in manifest[side]:
            if (problem := _problem(e)) is not None:
                raise _foreign("manifest", where, f"{side[:-1]} {e['name'][:100]}: {problem}")


def _problem(entry: Mapping[str, Any]) -> str | None:
    """What is wrong with an input or output that fits the schema."""
    kind, dtype, shape = entry["type"], entry["dtype"], entry["shape"]
    if not all(type(d) is int for d in shape):
        return "a dimension is no integer"
    if kind != dtype and (kind, dtype) not in (("int2", "int8"), ("int4", "int8"), ("uint2", "uint8"), ("uint4", "uint8")):
        return f"the type {kind} in arrays of {dtype}"
    if math.prod(shape) * ELEMENT_BYTES[dtype] > MOST_BYTES:
        return f"an array of {math.prod(shape) * ELEMENT_BYTES[dtype]} bytes"
    q = entry.get("quantization")
    if q is None:
        return None
    if not all(type(v) is int for v in (q["qmin"], q["qmax"], *q["zero_point"])):
        return "a zero point or a bound is no integer"
    scales, zeros = len(q["scale"]), len(q["zero_point"])  # one by channel, or one for all
    if (scales != zeros and 1 not in (scales, zeros)) or q["qmin"] > q["qmax"]:
        return "a quantization that is none"
    return None
