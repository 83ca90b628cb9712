"""Any other operator that the importer knows, as ONNX's own reference implementation computes it: without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper

from hawq_tvm.frontend.onnx.fold import REFERENCE_ERRORS

from .float_operators import Attributes


def by_reference(a: Attributes) -> Callable[..., Any]:
    """The function of a node."""
    from onnx.reference import ReferenceEvaluator

    proto = onnx.NodeProto()
    proto.CopyFrom(a.node)
    opsets = [helper.make_opsetid(a.node.domain, a.opset)]

    def compute(*operands: Any) -> Any:
        if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in operands):
            remedy = "choose the bits without measuring: `hawq-tvm quantize --bits`"
            raise a.fail("has no derivative here", remedy=remedy)
        names = [f"i{k}" if v is not None else "" for k, v in enumerate(operands)]
        outputs = [f"o{k}" if name else "" for k, name in enumerate(a.node.output)]
        proto.input[:], proto.output[:] = names, outputs
        given = {n: v.detach().numpy() for n, v in zip(names, operands, strict=True) if n}
        inputs = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in given.items()
        ]
        graph = helper.make_graph([proto], "node", inputs, [onnx.ValueInfoProto(name=o) for o in outputs if o])
        evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=opsets))
        try:
            found = iter(evaluator.run(None, given))
        except REFERENCE_ERRORS as e:
            raise ValueError(str(e)) from e
        results = tuple(torch.from_numpy(np.array(next(found))) if o else None for o in outputs)
        return results if len(results) > 1 else results[0]

    return compute
