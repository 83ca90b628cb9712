"""What the portable CPU kernels need to know of a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import tvm

from schedules.spelling.lookup_intrinsics import BYTES, WORDS

NEON = ("neon", "dotprod", "i8mm")


@dataclass(frozen=True)
class VectorUnit:
    """lanes: int32 lanes of a register.  registers: how many.

    pairs: it multiplies and adds pairs of 16 bits.  quads: it multiplies and adds four u8 with four s8 (VNNI).
    tiles: it has matrix registers for bytes (AMX).  neon: Arm's instructions for vectors: "neon", and of "dotprod"
    and "i8mm" what it has.  permutes: what AVX-512 looks up in registers, "bytes" or "words" (`looked_up`); "" for
    others.
    """

    lanes: int
    registers: int
    pairs: bool
    quads: bool = False
    tiles: bool = False
    neon: frozenset[str] = frozenset()
    permutes: str = ""

    @property
    def packs(self) -> int:
        """The lanes of the widest registers of int32 that x86 packs to bytes (AVX2, AVX512-BW); 0 where there are
        none.
        """
        return self.lanes if self.lanes >= 8 and not self.neon else 0

    @staticmethod
    @lru_cache(maxsize=16)
    def of(target: tvm.target.Target) -> VectorUnit:
        """The unit that LLVM will use for a target."""
        names = ("avx512bw", "avx512vnni", "avx2", "avxvnni", "sse2", "amx-tile", "amx-int8", "avx512vbmi", *NEON)
        with target:
            has = {f: bool(tvm.target.codegen.target_has_features(f)) for f in names}
        if has["avx512bw"]:
            tiles, permutes = has["amx-tile"] and has["amx-int8"], BYTES if has["avx512vbmi"] else WORDS
            return VectorUnit(16, 32, True, has["avx512vnni"], tiles, permutes=permutes)
        if has["avx2"]:
            return VectorUnit(8, 16, True, has["avxvnni"])
        if has["sse2"]:
            return VectorUnit(4, 16, True)
        return VectorUnit(4, 32, False, neon=frozenset(f for f in NEON if has[f]))
