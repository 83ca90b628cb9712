"""Targets of kind cuda: the GPU architectures that one library holds code for, and the CPU that launches its
kernels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import tvm
from tvm.backend import _autoload_backends

from hawq_tvm.core.errors import UsageError

# T4; A100; A10 and RTX 30; L4 and RTX 40; H100 and H200.
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90")
PRESETS: dict[str, tuple[str, ...]] = {
    "cuda": ARCHITECTURES,
    **{f"cuda-{a.replace('_', '')}": (a,) for a in ARCHITECTURES},
}
# Any x86-64 CPU of a machine with such a GPU: it only launches kernels.
HOST = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v2"}


def make(archs: Sequence[str], host: Mapping[str, Any] = HOST) -> tvm.target.Target:
    """The target for some of ARCHITECTURES: TVM's own `arch` is the oldest, and all are keys of the target.

    Raises UsageError for an architecture that no kernel was written for.
    """
    odd = sorted(set(archs) - set(ARCHITECTURES))
    if odd or not archs:
        raise UsageError(
            "no kernels for this GPU architecture", found=", ".join(odd) or "none", expected=", ".join(ARCHITECTURES)
        )
    load_backend()
    wanted = [a for a in ARCHITECTURES if a in archs]
    return tvm.target.Target({"kind": "cuda", "arch": wanted[0], "keys": ["cuda", "gpu", *wanted]}, host=dict(host))


def load_backend() -> None:
    """Load what TVM has for GPUs, which the command line's `import tvm` leaves out; at once where it is there."""
    _autoload_backends._load_builtin_backends()


def is_cuda(target: tvm.target.Target) -> bool:
    """Whether a target is a GPU of NVIDIA's."""
    return str(target.kind.name) == "cuda"


def architectures(target: tvm.target.Target) -> tuple[str, ...]:
    """The architectures, oldest first, that code for `target` is made for."""
    return tuple(sorted((str(k) for k in target.keys if re.fullmatch(r"sm_\d+", str(k))), key=number)) or (
        str(target.attrs["arch"]),
    )


def number(arch: str) -> int:
    """An architecture as its compute capability, times ten: sm_86 is 86."""
    return int(arch.removeprefix("sm_"))


def runs_on(arch: str, capability: int) -> bool:
    """Whether machine code for `arch` runs on a GPU: the same major version, and not a newer minor one."""
    return number(arch) // 10 == capability // 10 and number(arch) <= capability


def describe(target: tvm.target.Target) -> dict[str, Any]:
    """JSON-ready description, from which `parse` makes the same target again."""
    return {
        "kind": "cuda",
        "architectures": list(architectures(target)),
        **{k: str(target.host.attrs[k]) for k in ("mtriple", "mcpu")},
    }


def parse(fields: Mapping[str, Any]) -> tvm.target.Target:
    """The target of a description.

    Raises UsageError for anything that `describe` does not write.
    """
    archs = fields.get("architectures", ())
    if (
        not isinstance(archs, list)
        or not all(isinstance(a, str) for a in archs)
        or set(fields) - {"kind", "architectures", "mtriple", "mcpu"}
    ):
        raise UsageError(
            "a CUDA target is not understood",
            found=str(dict(fields)),
            expected='{"kind": "cuda", "architectures": ["sm_80", ...]}, mtriple and mcpu at will',
        )
    return make(archs, {**HOST, **{k: str(v) for k, v in fields.items() if k in ("mtriple", "mcpu")}})
