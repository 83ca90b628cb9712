"""How many bits every layer's weights and input have: one choice for all with what keeps 8, or a file's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hawq_tvm.core.errors import UsageError
from hawq_tvm.quantize.allocate.table import check_kernels, read_bits, widths
from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer

if TYPE_CHECKING:
    from .quantizer import Recipe


def layer_bits(graph: FloatGraph, recipe: Recipe) -> dict[str, tuple[int, int]]:
    """The bits of weights and of the input, by layer.

    Raises UsageError for bits without kernels, InputError and UsageError as `read_bits` does.
    """
    names = [layer.name for layer in graph.layers]
    text = str(recipe.bits)
    uniform = not Path(text).exists()
    if uniform and Path(text).suffix == ".json":
        raise UsageError(
            "cannot be read",
            where=f"--bits {text}",
            expected="8, 4, a choice such as W4A8, or the file that `allocate` wrote",
            found="No such file",
        )
    if uniform:
        pair = _pair(text)
        found = dict.fromkeys(names, pair) | dict.fromkeys(kept_depthwise(graph, recipe), (8, 8))
        if recipe.keep_ends:
            found[names[0]] = found[names[-1]] = (8, 8)
    else:
        found = read_bits(text, names)
    for name, pair in found.items():
        check_kernels(pair, f"{text}: {name}")
    return found


def kept_depthwise(graph: FloatGraph, recipe: Recipe) -> list[str]:
    """The depthwise layers that keep 8 bits though all others have fewer.

    A channel of them sums few products, whose errors do not even out, and they are a small part of a network's bytes
    and bit operations.
    """
    if not recipe.keep_depthwise or Path(str(recipe.bits)).exists() or _pair(str(recipe.bits)) == (8, 8):
        return []
    return [layer.name for layer in graph.layers if _depthwise(graph, layer)]


def _depthwise(graph: FloatGraph, layer: Layer) -> bool:
    """Whether every output channel of a convolution reads one channel."""
    shape = graph.parameters[layer.weight].shape
    reads = 1 if layer.kind == "matmul" else shape[0] // layer.group if layer.kind == "deconv" else shape[1]
    return layer.group > 1 and reads == 1


def _pair(text: str) -> tuple[int, int]:
    pair = (int(text), int(text)) if text.isdecimal() else widths(text, "--bits")
    check_kernels(pair, "--bits")
    return pair
