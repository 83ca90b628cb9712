"""model.h of a package: the C interface, and what the model takes and gives as constants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .source import quoted
from .toolchain import SOURCES


def text(manifest: Mapping[str, Any], version: str) -> str:
    """The header of a library whose interface a manifest describes."""
    api = (SOURCES / "abi.h").read_text()
    lines = [f"/* {version}. Written by hawq_tvm; it belongs to the library beside it. */", "", *api.splitlines()]
    lines += ["", "#ifndef HAWQ_MODEL_H", "#define HAWQ_MODEL_H", ""]
    for side, what in (("inputs", "INPUT"), ("outputs", "OUTPUT")):
        lines += [f"#define HAWQ_{side.upper()} {len(manifest[side])}", ""]
        for i, entry in enumerate(manifest[side]):
            lines += [*_entry(f"HAWQ_{what}_{i}", entry), ""]
    return "\n".join([*lines, "#endif", ""])


def _entry(prefix: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """What is known of an input or output; the type is the model's, the dtype the array's."""
    shape = entry["shape"]
    elements = math.prod(shape)
    yield f"#define {prefix}_NAME {quoted(entry['name'])}"
    yield f"#define {prefix}_TYPE {quoted(entry['type'])}"
    yield f"#define {prefix}_DTYPE {quoted(entry['dtype'])}"
    yield f"#define {prefix}_RANK {len(shape)}"
    if shape:  # C has no empty list of initial values
        yield f"#define {prefix}_SHAPE {{{', '.join(map(str, shape))}}}"
    yield f"#define {prefix}_ELEMENTS {elements}"
    yield f"#define {prefix}_BYTES {elements * np.dtype(entry['dtype']).itemsize}"
    if "saturates" in entry:
        # The declared range of a float input: what lies beyond counts as these.
        for key, end in zip(("LEAST", "MOST"), entry["saturates"], strict=True):
            yield f"#define {prefix}_{key} ({float(end)!r})"
    q = entry.get("quantization")
    if q:
        # real = scale (integer - zero point), by channel where there are several.
        for key, values in (
            ("SCALE", [repr(float(s)) for s in q["scale"]]),
            ("ZERO_POINT", [str(z) for z in q["zero_point"]]),
        ):
            yield f"#define {prefix}_{key}S {{{', '.join(values)}}}"
            yield f"#define {prefix}_{key}_COUNT {len(values)}"
            if len(values) == 1:
                yield f"#define {prefix}_{key} {values[0]}"
        yield f"#define {prefix}_QMIN ({q['qmin']})"
        yield f"#define {prefix}_QMAX ({q['qmax']})"
        yield f"#define {prefix}_ROUNDING {quoted(q['rounding'])}"
