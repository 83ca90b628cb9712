"""ONNX's element types, and what every frontend knows about values."""

from __future__ import annotations

from hawq_tvm.frontend.common.values import (
    FLOAT_KINDS,
    NARROW,
    QUANTIZED,
    Array,
    Constant,
    Failed,
    Result,
    Tensor,
    Value,
    storage_of,
)

# ONNX element types by number, named as NumPy and ml_dtypes do; float8 to float4, complex and strings are left out.
ELEMENT_TYPES: dict[int, str] = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    16: "bfloat16",
    21: "uint4",
    22: "int4",
    25: "uint2",
    26: "int2",
}


def onnx_type(kind: str) -> str:
    """The name of an element type in ONNX's operator schemas, such as "tensor(uint8)"."""
    return f"tensor({ {'float32': 'float', 'float64': 'double'}.get(kind, kind) })"


__all__ = [
    "ELEMENT_TYPES",
    "FLOAT_KINDS",
    "NARROW",
    "QUANTIZED",
    "Array",
    "Constant",
    "Failed",
    "Result",
    "Tensor",
    "Value",
    "onnx_type",
    "storage_of",
]
