"""The attributes of operators that are read in many places, as plain Python values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import relax

Pair = tuple[int, int]


def _pair(values: Any) -> Pair:
    first, second = (int(v) for v in values)
    return first, second


@dataclass(frozen=True)
class Conv2d:
    """Of relax.nn.conv2d; pairs are (vertical, horizontal), padding is top, left, bottom, right."""

    strides: Pair
    dilation: Pair
    padding: tuple[int, ...]
    groups: int
    data_layout: str
    kernel_layout: str

    @staticmethod
    def of(call: relax.Call) -> Conv2d:
        """Read a call."""
        a = call.attrs
        return Conv2d(
            _pair(a.strides),
            _pair(a.dilation),
            tuple(int(p) for p in a.padding),
            int(a.groups),
            str(a.data_layout),
            str(a.kernel_layout),
        )


@dataclass(frozen=True)
class Pool2d:
    """Of relax.nn.max_pool2d and hawq.sum_pool2d, whose padding is explicit; pairs are (vertical, horizontal)."""

    size: Pair
    strides: Pair
    dilation: Pair
    layout: str

    @staticmethod
    def of(call: relax.Call) -> Pool2d:
        """Read a call."""
        a = call.attrs
        ours = call.op.name.startswith("hawq.")
        size, strides, dilation, layout = (
            a[k] if ours else getattr(a, k) for k in ("pool_size", "strides", "dilation", "layout")
        )
        return Pool2d(_pair(size), _pair(strides), _pair(dilation), str(layout))


@dataclass(frozen=True)
class Pad:
    """Of relax.nn.pad with a constant: how many elements before and after, by dimension."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    value: int

    @staticmethod
    def of(call: relax.Call) -> Pad:
        """Read a call whose value is an integer."""
        width = [int(w) for w in call.attrs.pad_width]
        return Pad(tuple(width[0::2]), tuple(width[1::2]), int(call.attrs.pad_value))
