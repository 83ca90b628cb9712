"""What a compilation left, as a manifest and the other files of a package."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import schedules
from deploy import graph as stored_graph
from deploy import package as files_on_disk
from hawq_tvm.compiler.native import library as libraries
from hawq_tvm.compiler.pipeline import Compiled
from hawq_tvm.core import cut
from hawq_tvm.targets import target as targets
from hawq_tvm.verify.certificate import prove_graph, with_code

from . import manifest as manifests

LIBRARY = "model.so"


def files_of(compiled: Compiled, name: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest, sealed, and the files that it lists.

    Raises what `native.library.export` and `certify` raise.
    """
    made = manifests.describe(compiled, name)
    with tempfile.TemporaryDirectory(prefix="hawq_tvm_") as folder:
        library = Path(folder) / LIBRARY
        # The threads that compile leave the interpreter alone: it proves meanwhile.
        proved = prove_graph(compiled.packed, compiled.tir)
        graph = stored_graph.graph_files(cut.without_model(compiled.packed))
        header = libraries.export(compiled, made, library)
        architectures = targets.gpu_architectures(compiled.target)
        certificate = with_code(proved, compiled.packed, compiled.tir, library, architectures)
        files = {
            LIBRARY: library.read_bytes(),
            **header,
            **graph,
            "certificate.json": files_on_disk.dump_json(certificate.to_dict()),
            "report.json": files_on_disk.dump_json(schedules.report(compiled.tir)),
        }
        if "cut" in made:
            files[files_on_disk.TAIL] = cut.model_of(compiled.packed["main"])
    return files_on_disk.sealed(made, files), files
