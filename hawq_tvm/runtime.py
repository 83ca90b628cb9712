"""Packages without the compiler, by the name that users import; see `package/runtime.py`."""

from .core.tensors import Quantization, TensorSpec
from .package.runtime import Model, load

__all__ = ["Model", "Quantization", "TensorSpec", "load"]
