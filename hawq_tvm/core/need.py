"""Libraries that only an extra installs."""

from __future__ import annotations

from importlib import import_module

from .errors import UsageError


def need(module: str) -> None:
    """Raise UsageError when a module of the extra `quantize` is not installed."""
    try:
        import_module(module)
    except ImportError as e:
        raise UsageError(f"this needs {module}", found=str(e), remedy="pip install 'hawq-tvm[quantize]'") from e
