"""hawq_tvm: quantized neural networks as integer-only libraries, compiled by Apache TVM and proved bit-exact.

    import hawq_tvm as ht
    pkg = ht.compile("model.onnx", target="host")
    pkg.verify(random=4, seed=0).raise_if_mismatch()
    pkg.save("model.hawq")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["HawqError", "Package", "Quantization", "TensorSpec", "__version__", "compile", "hawq_checkpoint", "inspect", "load", "tune"]

if TYPE_CHECKING:
    from .errors import HawqError
    from .frontend.hawq.source import hawq_checkpoint
    from .inspection import inspect
    from .interface import Quantization, TensorSpec
    from .package import Package, compile, load
    from .tuner import tune

_HOMES = {
    "Package": "package", "compile": "package", "load": "package", "HawqError": "errors", "Quantization": "interface", "TensorSpec": "interface", "inspect": "inspection", "tune": "tuner",
    "hawq_checkpoint": "frontend.hawq.source",
}  # fmt: skip


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
