"""The generated part of a library: its plan as C tables."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import tvm_ffi

from hawq_tvm.core.errors import PackageError

from .plan import CONSTANT, Plan, Tensor

# A tensor in a stream of TVM's (Tensor::Save): magic, reserved, device, rank, type, shape, bytes, data.
_MAGIC = 0xDD5E40F096B4A13F


def text(plan: Plan, blob: bytes, version: str, architecture: str, features: Sequence[str]) -> str:
    """C source that defines `hawq_library_plan` (deploy/native/plan.h).

    blob: what the library keeps for TVM's virtual machine, in which the constants are.  Raises PackageError when one
    is not.
    """
    shapes = sorted({t.shape for t in plan.tensors})
    names = {s: f"shape_{i}" for i, s in enumerate(shapes)}
    arguments = [n for c in plan.calls for n in c.arguments]
    kernels, places = sorted({c.name for c in plan.calls}), _places(blob)
    lines = [
        '#include "plan.h"',
        "",
        "extern const uint8_t __tvm_ffi__library_bin[];",
        *(f"extern int __tvm_ffi_{k}(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);" for k in kernels),
        "",
        *(f"static const int64_t {names[s]}[] = {_list(s or (0,))};" for s in shapes),
        f"static const uint64_t storages[] = {_list(plan.storages or (0,))};",
        f"static const int32_t arguments[] = {_list(arguments or (0,))};",
        f"static const int32_t inputs[] = {_list(plan.inputs or (0,))};",
        f"static const int32_t outputs[] = {_list(plan.outputs or (0,))};",
        f"static const int64_t ranges[] = {{{', '.join(map(_range, plan.ranges or (None,)))}}};",
        f"static const char *const features[] = {{{''.join(f'{quoted(f)}, ' for f in features)}NULL}};",
        "",
        "static const hawq_plan_tensor tensors[] = {",
        *(f"    {_tensor(t, names[t.shape], blob, places)}," for t in plan.tensors),
        "};",
        "",
        "static const hawq_plan_call calls[] = {",
        *_calls(plan),
        "};",
        "",
        "const hawq_plan hawq_library_plan = {",
        (
            f"    {quoted(version)}, {quoted(architecture)}, features, __tvm_ffi__library_bin, storages, tensors,"
            " calls, inputs, outputs, ranges,"
        ),
        f"    {len(plan.storages)}, {len(plan.tensors)}, {len(plan.calls)}, {len(plan.inputs)}, {len(plan.outputs)}}};",
        "",
    ]
    return "\n".join(lines)


def _list(values: Iterable[int]) -> str:
    return f"{{{', '.join(map(str, values))}}}"


def _range(ends: tuple[int, int] | None) -> str:
    return "INT64_MIN, INT64_MAX" if ends is None else ", ".join(f"INT64_C({e})" for e in ends)


def _calls(plan: Plan) -> Iterable[str]:
    at = 0
    for c in plan.calls:
        yield f"    {{{quoted(c.name)}, __tvm_ffi_{c.name}, arguments + {at}, {len(c.arguments)}, {c.written}}},"
        at += len(c.arguments)
    if not plan.calls:
        yield "    {0},"


def _tensor(t: Tensor, shape: str, blob: bytes, places: Sequence[int]) -> str:
    kind = tvm_ffi.dtype(t.dtype)
    offset = _constant_offset(t, blob, places) if t.storage == CONSTANT else t.offset
    return (
        f"{{{offset}, {t.bytes}, {shape}, {quoted(t.dtype)}, {t.storage}, {len(t.shape)}, {{{int(kind.type_code)},"
        f" {kind.bits}, {kind.lanes}}}}}"
    )


def _places(blob: bytes) -> list[int]:
    """Where constants may begin: one search for all, since a blob is as large as all weights."""
    start, places = struct.pack("<QQ", _MAGIC, 0), list[int]()
    at = blob.find(start)
    while at >= 0:
        places.append(at)
        at = blob.find(start, at + 1)
    return places


def _constant_offset(t: Tensor, blob: bytes, places: Sequence[int]) -> int:
    """Where in the blob the bytes of a constant begin."""
    assert t.value is not None
    kind = tvm_ffi.dtype(t.dtype)
    # The reserved word, the device (CPU 0), and what follows, as TVM writes them on every machine: little endian.
    header = struct.pack(
        f"<QQiiiBBH{len(t.shape)}qq",
        _MAGIC,
        0,
        1,
        0,
        len(t.shape),
        int(kind.type_code),
        kind.bits,
        kind.lanes,
        *t.shape,
        t.bytes,
    )
    data = t.value.tobytes()
    for at in places:
        begin = at + len(header)
        if blob.startswith(header, at) and blob.startswith(data, begin):
            return begin
    raise PackageError(
        "a constant is not where TVM keeps constants",
        expected=f"{t.dtype}{list(t.shape)}",
        remedy="report it: this TVM writes them in another way",
    )


def quoted(text: str) -> str:
    """A string as C writes it, in ASCII."""
    return '"' + "".join(_escaped(b) for b in text.encode()) + '"'


def _escaped(byte: int) -> str:
    if byte in b'"\\':
        return "\\" + chr(byte)
    return chr(byte) if 32 <= byte < 127 and byte != ord("?") else f"\\{byte:03o}"
