"""hawq_tvm: quantized neural networks as integer-only libraries, compiled by Apache TVM and proved bit-exact.

import hawq_tvm as ht
pkg = ht.compile("model.onnx", target="host")
pkg.verify(random=4, seed=0).raise_if_mismatch()
pkg.save("model.hawq")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .core.version import __version__

__all__ = [
    "HawqError",
    "Package",
    "Quantization",
    "TensorSpec",
    "__version__",
    "compile",
    "hawq_checkpoint",
    "inspect",
    "load",
    "tune",
]

if TYPE_CHECKING:
    from hawq_tvm.compiler.inspection import inspect
    from hawq_tvm.core.errors import HawqError
    from hawq_tvm.core.tensors import Quantization, TensorSpec
    from hawq_tvm.frontend.hawq.source import hawq_checkpoint
    from hawq_tvm.package.package import Package, compile, load
    from hawq_tvm.tuning.tuner import tune

_HOMES = {
    "Package": "package.package",
    "compile": "package.package",
    "load": "package.package",
    "HawqError": "core.errors",
    "Quantization": "core.tensors",
    "TensorSpec": "core.tensors",
    "inspect": "compiler.inspection",
    "tune": "tuning.tuner",
    "hawq_checkpoint": "frontend.hawq.source",
}


def __getattr__(name: str) -> Any:
    """Load the compiler on first use: `import hawq_tvm` alone is cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hawq_tvm' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What is there to use, loaded or not."""
    return sorted(__all__)
