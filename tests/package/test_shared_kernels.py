"""Equal layers share a kernel, and how many processors compile decides about no byte."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable

import onnx
import pytest
from elftools.elf.elffile import ELFFile

import hawq_tvm as ht

from ..models import Graph, float_output


def chain() -> onnx.ModelProto:
    """Six convolutions, five of them alike but for their constants, and one with a residual: a kernel of its own."""
    g = Graph(3)
    x = g.qdq(g.input("x", [1, 16, 6, 6]), 0.03, 10)
    for _ in range(5):
        x = g.qdq(g.node("Relu", [g.conv(x, g.weight([16, 16, 1, 1]))]), 0.05)
    y = g.conv(x, g.weight([16, 16, 1, 1]))
    return g.model([float_output(g.qdq(g.node("Add", [x, y]), 0.07, 5))])


@pytest.fixture(scope="module")
def package() -> ht.Package:
    return ht.compile(chain().SerializeToString())


def kernels(library: bytes) -> set[str]:
    symbols = ELFFile(io.BytesIO(library)).get_section_by_name(".symtab")
    return {s.name for s in symbols.iter_symbols() if s.name.startswith("__tvm_ffi_conv")}


def test_equal_layers_share_a_kernel(package: ht.Package) -> None:
    rows = [r for r in package.report() if r["function"].startswith("conv")]
    assert len(rows) == 6 and Counter(r["rule"] for r in rows).total() == 6
    assert kernels(package.library.read_bytes()) == {"__tvm_ffi_conv2d_add_requantize", "__tvm_ffi_conv2d_requantize4"}


@pytest.mark.parametrize("through", ["vm", "c"])
def test_every_layer_is_verified_on_its_own(package: ht.Package, through: str) -> None:
    report = package.verify(random=2, seed=1, through=through)
    report.raise_if_mismatch()
    assert len(report.rows) >= 7


def test_the_bytes_are_the_same_on_any_number_of_processors(
    package: ht.Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    affinity: Callable[[int], set[int]] = lambda _: {0, 1, 2}  # noqa: E731
    monkeypatch.setattr(os, "sched_getaffinity", affinity)
    again = ht.compile(chain().SerializeToString())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    alone = ht.compile(chain().SerializeToString())
    assert package.library.read_bytes() == again.library.read_bytes() == alone.library.read_bytes()


def test_a_float_end_whose_kernels_are_named_like_shared_ones() -> None:
    g = Graph(5)
    x = g.qdq(g.input("x", [1, 4, 6, 6]), 0.03, 10)

    def pool(of: str) -> str:
        return g.node("MaxPool", [of], kernel_shape=[2, 2])

    # Pools of tensors of one shape are equal, and two readers leave each a kernel of its own.
    pooled = [pool(of) for of in (x, g.qdq(g.conv(x, g.weight([4, 4, 1, 1])), 0.1))]
    ends = [pool(g.node("Sigmoid", [g.node("Neg", [p])])) for p in pooled]
    ends += [pool(g.qdq(g.conv(p, g.weight([4, 4, 1, 1])), 0.1)) for p in pooled]
    y = g.node("Concat", ends, axis=1)
    package = ht.compile(g.model([float_output(y)]).SerializeToString(), allow_float_tail=True)
    package.verify(random=1).raise_if_mismatch()
