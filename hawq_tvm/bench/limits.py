"""What one core of this machine can do: products of 8-bit integers per second, and bytes read per second.

Small kernels, made by the same compiler as the networks', and timed; nothing here is taken from a data sheet. A core's peak
is the best of several repetitions, because everything else on a machine can only slow a repetition down.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from .. import target as targets
from ..errors import UsageError
from . import limit_kernels as kernels

SECONDS = 0.001  # of one repetition: long against the clock's grain, short against the time slice of a busy machine's scheduler
BUDGET = 0.25  # seconds of repetitions, of which there are at least LEAST
LEAST = 5
MEMORY_BYTES = 256 << 20  # far beyond any share of a last-level cache that one virtual machine gets


@dataclass(frozen=True)
class Peak:
    """One way to multiply 8-bit integers.

    instruction: its mnemonic and width.  products: multiplications per second of one core.
    """

    instruction: str
    products: float


@dataclass(frozen=True)
class Limits:
    """What was measured on one core.

    peaks: every way that this CPU has, best first; empty when none is written for its architecture.
    memory, l2: bytes read per second.  l2_bytes: the buffer behind `l2`.
    """

    peaks: tuple[Peak, ...]
    memory: float
    l2: float
    l2_bytes: int

    def tops(self, threads: int = 1) -> float | None:
        """The best peak of so many cores in 10^12 operations (multiplications and additions) per second."""
        return 2e-12 * self.peaks[0].products * threads if self.peaks else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; per core and second."""
        return {
            "int8_tops_per_core": {p.instruction: round(2e-12 * p.products, 4) for p in self.peaks},
            "memory_read_gb_per_s": round(self.memory / 1e9, 2), "l2_read_gb_per_s": round(self.l2 / 1e9, 2), "l2_buffer_bytes": self.l2_bytes,
        }  # fmt: skip


def instructions() -> dict[str, str | None]:
    """Every measured instruction of this architecture: None, or a sentence on why it cannot run here."""
    if platform.machine() != "x86_64":
        return {}
    return {k.name: _refusal(k) for k in kernels.KINDS}


def _refusal(kind: kernels.Kind) -> str | None:
    refused = targets.prepare(platform.machine(), kind.features)
    return refused.found if refused else None


def peak(instruction: str) -> Peak:
    """The products per second of one core with one instruction.

    Raises UsageError when this machine cannot run it.
    """
    known = instructions()
    if instruction not in known:
        raise UsageError("no such instruction is measured on this architecture", found=instruction, expected=", ".join(known) or "none")
    if known[instruction]:
        raise UsageError("cannot be measured", where=instruction, found=str(known[instruction]))
    kind = next(k for k in kernels.KINDS if k.name == instruction)
    run, products = compiled(kind), kind.products
    data, weights = (tvm.runtime.tensor(a) for a in kind.operands(np.random.default_rng(0)))
    sums = tvm.runtime.tensor(np.zeros(kind.sums, np.int32))
    return Peak(instruction, _best(lambda repeats: run(data, weights, sums, repeats)) * products)


def compiled(kind: kernels.Kind) -> Callable[..., Any]:
    """The kernel of an instruction: main(data, weights, sums, repeats)."""
    return kernels.build(kind.func(), _target(kind.features))


def read_speed(size: int) -> float:
    """Bytes per second that one core reads from a buffer of about `size` bytes, over and over."""
    run = kernels.build(kernels.reader(), targets.host())
    blocks = max(1, size // kernels.BLOCK_BYTES)
    buffer = tvm.runtime.tensor(np.ones(blocks * kernels.BLOCK_BYTES // 4, np.int32))
    sums = tvm.runtime.tensor(np.zeros(kernels.READ_LANES, np.int32))
    return _best(lambda repeats: run(buffer, sums, blocks, repeats)) * blocks * kernels.BLOCK_BYTES


def measure() -> Limits:
    """Every limit of one core of this machine, in about two seconds.

    The thread that calls is the one that is measured; pin it first when that matters.
    """
    peaks = [peak(name) for name, why in instructions().items() if why is None]
    peaks.sort(key=lambda p: -p.products)
    half = _l2_bytes() // 2  # the other half is left to whatever shares the cache
    return Limits(tuple(peaks), read_speed(MEMORY_BYTES), read_speed(half), half)


def _target(features: tuple[str, ...]) -> tvm.target.Target:
    """Code for exactly the vectors that an instruction needs, so that LLVM chooses no wider one."""
    return tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v4" if "avx512f" in features else "x86-64-v3", "mattr": [f"+{f}" for f in features]})


def _best(run: Callable[[int], Any]) -> float:
    """The most repeats per second of `run(repeats)` in any of several repetitions."""
    repeats = 1
    while (seconds := _seconds(run, repeats)) < SECONDS:
        repeats *= 2
    repeats = max(1, round(repeats * SECONDS / seconds))
    times = [_seconds(run, repeats) for _ in range(LEAST)]
    while sum(times) < BUDGET:
        times.append(_seconds(run, repeats))
    return repeats / min(times)


def _seconds(run: Callable[[int], Any], repeats: int) -> float:
    start = time.perf_counter()
    run(repeats)
    return time.perf_counter() - start


def _l2_bytes() -> int:
    """The size of one core's second-level cache as the kernel says, or 256 KiB, which every CPU of this century has."""
    text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    if text.exists() and (size := text.read_text().strip()).endswith("K"):
        return int(size[:-1]) << 10
    return 256 << 10
