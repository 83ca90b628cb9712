"""Conv in one to three dimensions, ConvTranspose in one or two; QLinearConv and ConvInteger expand to the former."""

from __future__ import annotations

from tvm import relax

from hawq_tvm.frontend.common.conv import check_channels, check_transposed, convolved, convolved_transposed

from .node import Node, handles
from .values import Value
from .window import Window, auto_pad, explicit_pads, positive, read_window, split_padding


def convolve(node: Node, x: relax.Expr, w: relax.Expr, bias: Value | None) -> relax.Expr:
    """The float convolution of a node's attributes: x (N, C, spatial), w (O, C / group, spatial), bias (O)."""
    group = node.attr("group", 1)
    data, weight = check_channels(node, x, w, group, 1, dimensions=3)
    return convolved(node, x, w, bias, read_window(node, data[2:], weight[2:]), group)


@handles("Conv")
def conv(node: Node) -> relax.Expr:
    """Convolution of float tensors."""
    return convolve(node, node.expr(0), node.expr(1), node.optional(2))


@handles("ConvTranspose")
def conv_transpose(node: Node) -> relax.Expr:
    """Transposed convolution; output_shape and auto_pad become explicit padding."""
    x, w = node.expr(0), node.expr(1)
    group = node.attr("group", 1)
    data, weight = check_channels(node, x, w, group, 0)
    window, extra = _transposed_window(node, data[2:], weight[2:])
    return convolved_transposed(node, x, w, node.optional(2), window, extra, group)


def _transposed_window(node: Node, spatial: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[Window, tuple[int, ...]]:
    count = len(spatial)
    if node.has("kernel_shape"):
        declared = positive(node, "kernel_shape", count)
        node.need(
            declared == kernel,
            "has a kernel_shape that is not its weight's",
            expected=list(kernel),
            found=list(declared),
        )
    strides, dilations = positive(node, "strides", count), positive(node, "dilations", count)
    extra = node.attr("output_padding", [0] * count)
    if len(extra) != count or any(not isinstance(e, int) or e < 0 for e in extra):
        raise node.fail(
            "has an output_padding that does not fit", expected=f"{count} integers of at least 0", found=str(extra)
        )
    mode = auto_pad(node)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    full = [s * (d - 1) + e + r for s, d, e, r in zip(strides, spatial, extra, reach, strict=True)]
    if node.has("output_shape") or mode.startswith("SAME"):
        wanted = node.attr("output_shape", [d * s for d, s in zip(spatial, strides, strict=True)])
        wanted = wanted[2:] if len(wanted) == count + 2 else wanted
        if len(wanted) != count or any(
            not isinstance(o, int) or o < 1 or o > f for o, f in zip(wanted, full, strict=False)
        ):
            raise node.fail(
                "has an output_shape that does not fit",
                expected=f"at most {full} (or more output_padding)",
                found=str(wanted),
            )
        before, after = split_padding([f - o for f, o in zip(full, wanted, strict=True)], upper=mode == "SAME_UPPER")
    elif mode == "VALID":
        before, after = (0,) * count, (0,) * count
    else:
        before, after = explicit_pads(node, count)
    window = Window(kernel, strides, dilations, before, after)
    check_transposed(node, spatial, window, tuple(extra))
    return window, tuple(extra)
