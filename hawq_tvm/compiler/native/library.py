"""The library of a package and the header beside it: with the C interface for a CPU, for TVM's virtual machine alone
on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hawq_tvm.compiler.pipeline import Compiled
from hawq_tvm.core.errors import PackageError

from . import header, link, plan

HEADER = "model.h"


def export(compiled: Compiled, manifest: Mapping[str, Any], library: Path) -> dict[str, bytes]:
    """Write the library that a manifest describes; returns the header as a file of the package, none for a GPU.

    Raises UsageError where no C compiler for the architecture is installed, PackageError when linking fails.
    """
    target, producer = manifest["target"], manifest["producer"]
    if target["kind"] == "cuda":
        _for_gpu(compiled, library)
        return {}
    version = (
        f"hawq_tvm {producer['hawq_tvm']}, tvm {producer['tvm']}: {manifest['name']} for {target['architecture']}"
        f" {target.get('mcpu', '')}".rstrip()
    )
    calls = plan.make(compiled.tir, compiled.target)
    link.export(
        compiled.executable,
        library,
        calls,
        kernels=compiled.objects.wait() if compiled.objects else None,
        version=version,
        architecture=target["architecture"],
        features=target["cpu_features"],
    )
    return {HEADER: header.text(manifest, version).encode()}


def _for_gpu(compiled: Compiled, library: Path) -> None:
    try:
        compiled.executable.export_library(str(library), options=[link.NO_EXPORT])
    except (RuntimeError, FileNotFoundError) as e:
        raise PackageError(
            "the library could not be linked",
            where=str(library),
            found=str(e).splitlines()[0],
            remedy="install a C++ compiler (apt-get install g++)",
        ) from e
