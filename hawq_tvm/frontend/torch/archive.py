"""A .pt2 file without what could run code: PyTorch reads pickles in it without restriction, libraries, and Python expressions.

What is left is checked here and written anew, so that PyTorch reads the very bytes that were checked.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hawq_tvm.errors import ModelError
from hawq_tvm.trust import REMEDY

# PyTorch's own switch: every torch.load is one of tensors and plain values alone.
RESTRICT, LIFT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# Files of objects that are pickled in other ways, and of machine code, by what is in their path.
OBJECTS = re.compile(r"(^|/)(custom_obj|opaque_obj)|(^|/)data/(aotinductor|executorch)/|\.(so|pyd|dll|dylib|py|pyc)$")
# Sizes as sympy's srepr writes them; PyTorch evaluates them as Python.
SIZE_WORDS = frozenset(
    ["Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "ModularIndexing", "CeilToInt", "FloorToInt", "CeilDiv", "PowByNatural", "IntTrueDiv", "FloatTrueDiv", "Where", "LShift", "RShift", "Identity", "Equality", "Unequality", "Eq", "Ne", "LessThan", "GreaterThan", "StrictLessThan", "StrictGreaterThan", "And", "Or", "Not", "positive", "negative", "nonnegative", "nonpositive", "integer", "real", "precision", "True", "False", "true", "false"]
)
SIZE = re.compile(r"(?:\s*(?:'[\w.+-]*'|\d+|[A-Za-z_]\w*|[-+*(),=]))*\s*")
NAME = re.compile(r"'[^']*'|[A-Za-z_]\w*")
TARGET = re.compile(r"(torch\.ops|_operator|math)(\.\w+)+|torch\.(sym_\w+|_sym_\w+)|\w+")
CONTAINERS = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"} | {f"torch.fx.immutable_collections.immutable_{k}" for k in ("list", "dict")})
GUARD_NODES = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.Not, ast.UnaryOp, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Compare,
    ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Constant, ast.Name, ast.Load, ast.Subscript, ast.Attribute, ast.Call, ast.Is, ast.IsNot,
)  # fmt: skip
GUARD_NAMES = frozenset({"L", "math", "size", "stride", "storage_offset", "ndim", "shape", "isnan", "inf"})
# State of the first format, called so and pickled.
PICKLES = frozenset({"serialized_state_dict.json", "serialized_constants.json"})
_LOCK = threading.Lock()


def checked(source: str | os.PathLike[str] | bytes, where: str) -> io.BytesIO:
    """The archive with what was checked alone.  Raises ModelError for one that only an unrestricted reader can read."""
    try:
        with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else Path(source)) as archive:
            names = archive.namelist()
            if len(set(names)) < len(names):
                raise _untrusted("holds two files of one name", where, max(names, key=names.count))
            content = {name: archive.read(name) for name in names}
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, zlib.error) as e:
        raise ModelError("is not a readable exported program", where=where, expected="a .pt2 file of torch.export.save", found=str(e)) from None
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            _check_file(name, data, where)
            archive.writestr(zipfile.ZipInfo(name), data)
    made.seek(0)
    return made


@contextmanager
def restricted() -> Iterator[None]:
    """Inside, torch.load reads tensors and plain values alone, whatever its caller asked for."""
    with _LOCK:
        before = {key: os.environ.pop(key, None) for key in (RESTRICT, LIFT)}
        os.environ[RESTRICT] = "1"
        try:
            yield
        finally:
            del os.environ[RESTRICT]
            os.environ.update({key: value for key, value in before.items() if value is not None})


def _untrusted(message: str, where: str, found: str) -> ModelError:
    return ModelError(message, where=where, expected="tensors, numbers and operators alone", found=found[:200], remedy=REMEDY)


def _check_file(name: str, data: bytes, where: str) -> None:
    if OBJECTS.search(name) and data:
        raise _untrusted("holds pickled objects or machine code", where, name)
    if not name.endswith(".json") or name in PICKLES:
        return
    try:
        pending: list[tuple[str, Any]] = [("", json.loads(data))]
    except (ValueError, RecursionError) as e:
        raise ModelError("holds JSON that cannot be read", where=where, found=f"{name}: {e}", remedy="copy or export it again") from None
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value.items())
        elif isinstance(value, list):
            pending.extend((key, v) for v in value)
        elif isinstance(value, str):
            _check_text(key, value, where)


def _check_text(key: str, text: str, where: str) -> None:
    if key == "expr_str":
        safe = SIZE.fullmatch(text) and all(w[0] == "'" or w in SIZE_WORDS for w in NAME.findall(text))
    elif key == "guards_code":
        safe = _is_guard(text)
    elif key == "target":
        safe = TARGET.fullmatch(text) is not None
    elif key in ("in_spec", "out_spec") and text:
        safe = _is_container(text)
    elif key == "path_name":
        safe = OBJECTS.search(text) is None
    else:
        safe = True
    if not safe:
        raise _untrusted("holds text that PyTorch would run as Python", where, f"{key} {text!r}")


def _is_guard(text: str) -> bool:
    """Whether a Python expression compares sizes and numbers alone."""
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    names = {n.id if isinstance(n, ast.Name) else n.attr for n in nodes if isinstance(n, ast.Name | ast.Attribute)}
    return all(isinstance(n, GUARD_NODES) for n in nodes) and names <= GUARD_NAMES


def _is_container(text: str) -> bool:
    """Whether how inputs and outputs are packed is told by tuples, lists and dictionaries alone."""
    try:
        pending: list[Any] = [json.loads(text)]
    except (ValueError, RecursionError):
        return False
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, dict):
            if value.get("type") not in CONTAINERS or "__enum__" in str(value.get("context")) or "\\" in str(value.get("context")):
                return False
            pending.extend(value.values())
    return True
