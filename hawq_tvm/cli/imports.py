"""Imports that a command can do without: TVM imports PyTorch wherever it is installed, which takes two seconds, and
what it has for GPUs and accelerators.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from hawq_tvm.core.collection import uncollected

# TVM's distributed runtime and its GPU backends ask for types and operators that are not there, and pass over the
# error; but its traceback reads the debug information of every library: 0.2 s.  `targets/gpu.py` loads the backends.
LEFT_OUT = ("torch", "tvm.runtime.disco")
BACKENDS = "TVM_DEVICE_BACKEND_AUTOLOAD"
# Read when something of them is first used: its tuner, which nothing here uses, and what schedules GPU kernels.
LATER = ("tvm.s_tir.meta_schedule", "tvm.s_tir.dlight")


class _Shorter(Loader):
    """Imports a package as if what is left out were not installed, which it is made for."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.modules.update(dict.fromkeys(LEFT_OUT))  # type: ignore[arg-type]
        given = os.environ.get(BACKENDS)
        os.environ[BACKENDS] = "0"
        sys.meta_path.insert(0, later := _Later())
        try:
            with uncollected():
                self.loader.exec_module(module)
        finally:
            sys.meta_path.remove(later)
            for name in LEFT_OUT:
                del sys.modules[name]
            del os.environ[BACKENDS]
            if given is not None:
                os.environ[BACKENDS] = given


class _Later(MetaPathFinder):
    """Finds what is imported for its name alone."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in LATER else None
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


class _Finder(MetaPathFinder):
    """Finds the first of TVM's two packages, which imports the other."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in ("tvm", "tvm_ffi"):
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None and "torch" not in sys.modules:
            spec.loader = _Shorter(spec.loader)
        return spec


def tvm_without_torch() -> None:
    """Make a later `import tvm` leave PyTorch to who needs it; for a process that is this project's own, where nobody
    hands PyTorch's tensors to TVM.
    """
    if "tvm_ffi" not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
