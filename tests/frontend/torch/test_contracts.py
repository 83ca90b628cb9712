"""What PyTorch computed of every result's shape while it exported is compared with what became of it."""

from __future__ import annotations

import pytest
from tvm import relax

import hawq_tvm as ht
from hawq_tvm.errors import ModelError
from hawq_tvm.frontend.torch import node as torch_node

from .programs import Between, export, torch


def test_a_handler_that_gives_another_shape_than_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    program = export(Between(torch.nn.functional.relu), (2, 6, 7))
    assert ht.inspect(program).compilable
    monkeypatch.setitem(torch_node.HANDLERS, "aten.relu", lambda node: relax.op.expand_dims(node.x(), [0]))
    words = r"expected .*\[2, 6, 7\] \(PyTorch's export\); found .*\[1, 2, 6, 7\]"
    with pytest.raises(ModelError, match=words) as error:
        ht.compile(program)
    report = ht.inspect(program)
    assert not report.compilable and error.value.message in report.error + report.unsupported[0]["reason"]


def test_symbolic_sizes_are_what_the_shape_makes_them() -> None:
    dynamic = {"xs": ({0: torch.export.Dim("batch", max=8)},)}
    program = export(Between(torch.nn.functional.relu), (2, 6, 7), dynamic_shapes=dynamic)
    name = ht.inspect(program).model["inputs"][0]["name"]
    assert ht.compile(program, shapes={name: (4, 6, 7)}).outputs[0]["shape"] == [4, 6, 7]
