"""How many bits every layer's weights and input have: one choice for all with what keeps 8, or a file's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hawq_tvm.core.errors import UsageError
from hawq_tvm.quantize.allocate.table import check_kernels, read_bits, widths
from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer

if TYPE_CHECKING:
    from .recipe import Recipe

# The smallest layers that have no more than this share of the weights together keep 8 bits; without the first and last.
SMALL_SHARE = 1 / 32


def layer_bits(graph: FloatGraph, recipe: Recipe) -> dict[str, tuple[int, int]]:
    """The bits of weights and of the input, by layer.

    Raises UsageError for bits without kernels, InputError and UsageError as `read_bits` does.
    """
    names = [layer.name for layer in graph.layers]
    pair = uniform(recipe.bits)
    if pair is None:
        found = read_bits(str(recipe.bits), names)
    else:
        found = dict.fromkeys(names, pair) | dict.fromkeys(kept_small(graph, recipe), (8, 8))
        if recipe.keep_ends:
            found[names[0]] = found[names[-1]] = (8, 8)
    for name, one in found.items():
        check_kernels(one, f"{recipe.bits}: {name}")
    return found


def uniform(bits: int | str | Path) -> tuple[int, int] | None:
    """The one choice of bits for all layers; None where a file says what each has.

    Raises UsageError for a choice without kernels, and for a file that is not there.
    """
    text = str(bits)
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


def kept_small(graph: FloatGraph, recipe: Recipe) -> list[str]:
    """The layers that keep 8 bits though all others have fewer, as they are a small part of a network's bytes:
    depthwise convolutions, whose outputs sum few products with errors that do not even out, and the smallest others,
    through which all data go as through the large ones; of equal ones the first.

    The first and the last layer have an option of their own.
    """
    pair, inner = uniform(recipe.bits), graph.layers[1:-1]
    if not recipe.keep_small or pair is None or pair == (8, 8):
        return []
    sizes = {layer.name: graph.parameters[layer.weight].numel() for layer in inner}
    kept, room = {layer.name for layer in inner if _depthwise(graph, layer)}, SMALL_SHARE * sum(sizes.values())
    for name in sorted((name for name in sizes if name not in kept), key=sizes.__getitem__):
        if sizes[name] > room:
            break
        kept.add(name)
        room -= sizes[name]
    return [name for name in sizes if name in kept]


def _depthwise(graph: FloatGraph, layer: Layer) -> bool:
    """Whether every output channel reads one channel."""
    weight = graph.parameters[layer.weight]
    return layer.group > 1 and (weight.shape[0] // layer.group if layer.kind == "deconv" else weight.shape[1]) == 1
