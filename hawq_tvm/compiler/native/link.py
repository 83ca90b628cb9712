"""An executable to the library of a package: TVM's objects, the generated plan and the C runtime, linked by the
machine's C compiler.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
from elftools.elf.elffile import ELFFile
from tvm import relax

from hawq_tvm.core.errors import PackageError
from hawq_tvm.core.threads import in_threads

from . import source, toolchain
from .plan import Plan

BLOB = "__tvm_ffi__library_bin"
# TVM's C marks its symbols by this macro, which only TVM's own headers define.
NO_EXPORT = "-DTVM_EXPORT="
# The pointers by which kernels reach TVM's runtime, or the C runtime (deploy/native/threads.c).
POINTERS = frozenset({"__TVMBackendParallelLaunch", "__TVMBackendAllocWorkspace", "__TVMBackendFreeWorkspace"})
# Two libraries in a process have kernels of the same names: each calls its own. Only what TVM replaces when it is there
# stays open.
_OPEN = "{ TVMFFIErrorSetRaisedFromCStrParts; };\n"
# Nothing but the contents decides about the bytes: no debug information, no random identifier. The certificate needs
# the symbols.
OPTIONS = (
    "-shared",
    "-Wl,-soname,model.so",
    "-Wl,--build-id=none",
    "-Wl,--strip-debug",
    "-Wl,-z,defs",
    "-Wl,-z,noexecstack",
    "-Wl,--as-needed",
)


def export(
    executable: relax.VMExecutable,
    library: Path,
    plan: Plan,
    *,
    version: str,
    architecture: str,
    features: Sequence[str],
    options: Sequence[str] = (),
    kernels: Sequence[bytes] | None = None,
) -> None:
    """Write the library of a CPU's executable, C interface included.

    kernels: object files, where the executable is without its kernels.  features: what `hawq_model_create` looks for
    in the CPU.  options: more for the C compiler.
    Raises UsageError where no C compiler for the architecture is installed, PackageError when it fails.
    """
    command = toolchain.compiler(architecture)

    with tempfile.TemporaryDirectory(prefix="hawq_tvm_") as temporary:
        folder = Path(temporary)
        files = _objects(executable.mod, folder, kernels)
        _check_self_contained(files)
        text = source.text(plan, _blob(files), version, architecture, features)
        (folder / "plan.c").write_text(text)
        (folder / "open.txt").write_text(_OPEN)
        objects = toolchain.runtime_objects(architecture, folder, options)
        generated = str(folder / "hawq_plan.o")
        flags = [*toolchain.options(architecture), *options, "-fvisibility=hidden"]
        toolchain.run([*command, *flags, "-c", str(folder / "plan.c"), "-o", generated], "the library's plan")
        linked = [*files, generated, *objects, f"-Wl,--dynamic-list={folder / 'open.txt'}", "-pthread", "-lm"]
        toolchain.run([*command, *options, *OPTIONS, "-o", str(library), *linked], "the library")


def _objects(module: tvm.runtime.Module, folder: Path, kernels: Sequence[bytes] | None) -> list[str]:
    """An executable as object files: one of each LLVM module, or those given, and the blob for TVM's virtual
    machine.
    """
    first = module.imports[0]
    modules = [first, *first.imports]
    paths = [str(folder / f"lib{i}.o") for i in range(len(modules if kernels is None else kernels))]
    if kernels is None:
        in_threads(lambda i: modules[i].write_to_file(paths[i], "o"), range(len(modules)))
    else:
        for path, data in zip(paths, kernels, strict=True):
            Path(path).write_bytes(data)
    text = first["_get_target_string"]()
    blob = tvm.get_global_func("runtime.ModulePackImportsToLLVM")(module, False, text, "")
    blob.write_to_file(str(folder / "devc.o"), "o")
    return [*paths, str(folder / "devc.o")]


def _symbols(path: str) -> tuple[Any, Any]:
    elf: Any = ELFFile(io.BytesIO(Path(path).read_bytes()))
    return elf, elf.get_section_by_name(".symtab")


def _check_self_contained(objects: Sequence[str]) -> None:
    """Refuse kernels that call functions of TVM's runtime which the C runtime does not have: no operator of ours
    does.
    """
    for path in objects:
        _, symbols = _symbols(path)
        foreign = sorted(
            s.name for s in symbols.iter_symbols() if s.name.startswith("__TVM") and s.name not in POINTERS
        )
        if foreign:
            raise PackageError(
                "a kernel calls TVM's runtime, which a library with a C interface does without",
                found=", ".join(foreign),
            )


def _blob(objects: Sequence[str]) -> bytes:
    """What the library keeps for TVM's virtual machine."""
    for path in objects:
        elf, symbols = _symbols(path)
        found = symbols.get_symbol_by_name(BLOB)
        if found:
            data: bytes = elf.get_section(found[0]["st_shndx"]).data()
            return data[found[0]["st_value"] :]
    raise PackageError(
        "the library holds nothing for TVM's virtual machine",
        expected=BLOB,
        found=", ".join(Path(o).name for o in objects),
    )
