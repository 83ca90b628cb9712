"""CUDA source that goes before the kernels of every library: helper functions that TIR calls by name."""

from .cuda_device import SOURCE as PRELUDE

__all__ = ["PRELUDE"]
