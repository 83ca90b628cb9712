"""How many bits every layer's weights and input have: one choice for all with what keeps 8, or a file's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hawq_tvm.core.errors import UsageError
from hawq_tvm.quantize.allocate.table import check_kernels, read_bits, widths
from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer

if TYPE_CHECKING:
    from .recipe import Recipe

# A layer whose outputs sum at most so many products, and which has less than such a share of all weights, is thin.
FEW_PRODUCTS, SMALL_SHARE = 32, 0.001


def layer_bits(graph: FloatGraph, recipe: Recipe) -> dict[str, tuple[int, int]]:
    """The bits of weights and of the input, by layer.

    Raises UsageError for bits without kernels, InputError and UsageError as `read_bits` does.
    """
    names = [layer.name for layer in graph.layers]
    pair = uniform(recipe)
    if pair is None:
        found = read_bits(str(recipe.bits), names)
    else:
        found = dict.fromkeys(names, pair) | dict.fromkeys(kept_thin(graph, recipe), (8, 8))
        if recipe.keep_ends:
            found[names[0]] = found[names[-1]] = (8, 8)
    for name, one in found.items():
        check_kernels(one, f"{recipe.bits}: {name}")
    return found


def uniform(recipe: Recipe) -> tuple[int, int] | None:
    """The one choice of bits for all layers; None where a file says what each has.

    Raises UsageError for a choice without kernels, and for a file that is not there.
    """
    text = str(recipe.bits)
    if Path(text).exists():
        return None
    if Path(text).suffix == ".json":
        raise UsageError(
            "cannot be read",
            where=f"--bits {text}",
            expected="8, 4, a choice such as W4A8, or the file that `allocate` wrote",
            found="No such file",
        )
    pair = (int(text), int(text)) if text.isdecimal() else widths(text, "--bits")
    check_kernels(pair, "--bits")
    return pair


def kept_thin(graph: FloatGraph, recipe: Recipe) -> list[str]:
    """The thin layers, which keep 8 bits though all others have fewer: depthwise convolutions, and small ones.

    Their outputs sum few products, whose errors do not even out, and they are a small part of a network's bytes. The
    first and the last layer have an option of their own.
    """
    if not recipe.keep_thin or uniform(recipe) in (None, (8, 8)):
        return []
    every = sum(graph.parameters[layer.weight].numel() for layer in graph.layers)
    return [layer.name for layer in graph.layers[1:-1] if _thin(graph, layer, every)]


def _thin(graph: FloatGraph, layer: Layer, every: int) -> bool:
    """Whether every output channel reads one channel, or few numbers in a layer that has few of all the weights."""
    weight = graph.parameters[layer.weight]
    reads = (
        1 if layer.kind == "matmul" else weight.shape[0] // layer.group if layer.kind == "deconv" else weight.shape[1]
    )
    small = graph.products(layer, 1) <= FEW_PRODUCTS and weight.numel() < SMALL_SHARE * every
    return small or (layer.group > 1 and reads == 1)
