"""Packages without the compiler, by the name that users import; see `package/runtime.py`."""

from .package.runtime import Model, load

__all__ = ["Model", "load"]
