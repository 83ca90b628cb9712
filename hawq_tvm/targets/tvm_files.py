"""TVM as it is installed, found without importing it."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from hawq_tvm.core.errors import PackageError

INSTALL = "bash deploy/environment.sh VENV runtime, or pip install hawq-tvm"


def tvm_folder() -> Path:
    """Where TVM's files are installed, found without importing it.

    Raises PackageError when they are nowhere.
    """
    spec = find_spec("tvm")
    for place in spec.submodule_search_locations or () if spec else ():
        if (Path(place) / "lib" / "libtvm_runtime.so").is_file():
            return Path(place)
    raise PackageError(
        "TVM's runtime libraries are not installed",
        expected="tvm/lib/libtvm_runtime.so among Python's packages",
        remedy=INSTALL,
    )


def tvm_version() -> str:
    """The version of TVM that is installed, read without importing it.

    Raises PackageError when there is none.
    """
    path = tvm_folder() / "_version.py"
    found = (
        re.search(r"^__version__ = (?:version = )?'([^']+)'", path.read_text(), re.MULTILINE)
        if path.is_file()
        else None
    )
    if found is None:
        raise PackageError("TVM's version is not known", expected=f"a version in {path}", remedy=INSTALL)
    return found.group(1)
