"""CUDA source that goes before the kernels of every library: helper functions that TIR calls by name."""

from __future__ import annotations

# Every function is `static __device__ __forceinline__`, guarded by __CUDA_ARCH__ where an architecture lacks its instruction.
PRELUDE = ""
