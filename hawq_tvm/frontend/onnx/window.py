"""The sliding window of a node: its attributes kernel_shape, strides, dilations, pads and auto_pad."""

from __future__ import annotations

from collections.abc import Sequence

from hawq_tvm.frontend.common.window import Ints, Window, fitting, split_padding

from .node import Node

AUTO_PADS = ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")


def positive(node: Node, name: str, count: int, default: int = 1) -> Ints:
    """A list attribute with one positive number per spatial axis."""
    values = node.attr(name, [default] * count)
    if len(values) != count or any(not isinstance(v, int) or v < 1 for v in values):
        raise node.fail(f"has {name} that do not fit", expected=f"{count} positive integers", found=str(values))
    return tuple(values)


def auto_pad(node: Node) -> str:
    """The auto_pad attribute."""
    mode = node.attr("auto_pad", "NOTSET") or "NOTSET"
    node.need(mode in AUTO_PADS, "has an unknown auto_pad", expected=", ".join(AUTO_PADS), found=mode)
    return mode


def explicit_pads(node: Node, count: int) -> tuple[Ints, Ints]:
    """The pads attribute, begins and ends; negative padding is refused."""
    pads = node.attr("pads", [0] * (2 * count))
    if len(pads) != 2 * count or any(not isinstance(p, int) or p < 0 for p in pads):
        raise node.fail("has pads that do not fit", expected=f"{2 * count} integers of at least 0", found=str(pads))
    return tuple(pads[:count]), tuple(pads[count:])


def read_window(node: Node, spatial: Sequence[int], kernel: Sequence[int] | None = None) -> Window:
    """The window of a node over data of the given spatial sizes.

    kernel: the weight's spatial sizes; kernel_shape must agree with it when given.  Raises ModelError when
    the kernel does not fit into the padded data.
    """
    count = len(spatial)
    node.need(
        count in (1, 2, 3),
        "works on data of 1 to 3 dimensions",
        expected="rank 3 to 5",
        found=count + 2,
    )
    if kernel is None:
        node.need(node.has("kernel_shape"), "lacks its attribute kernel_shape")
        kernel = positive(node, "kernel_shape", count)
    elif node.has("kernel_shape"):
        declared = positive(node, "kernel_shape", count)
        node.need(
            declared == tuple(kernel),
            "has a kernel_shape that is not its weight's",
            expected=list(kernel),
            found=list(declared),
        )
    strides, dilations = positive(node, "strides", count), positive(node, "dilations", count)
    mode = auto_pad(node)
    window = Window(tuple(kernel), strides, dilations, (0,) * count, (0,) * count)
    if mode == "NOTSET":
        before, after = explicit_pads(node, count)
    elif mode == "VALID":
        before, after = window.before, window.after
    else:
        outputs = [-(-d // s) for d, s in zip(spatial, strides, strict=True)]
        totals = [
            max(0, (o - 1) * s + r - d) for o, s, r, d in zip(outputs, strides, window.reach, spatial, strict=True)
        ]
        before, after = split_padding(totals, upper=mode == "SAME_UPPER")
    return fitting(node, Window(tuple(kernel), strides, dilations, before, after), spatial)


__all__ = ["Window", "auto_pad", "explicit_pads", "positive", "read_window", "split_padding"]
