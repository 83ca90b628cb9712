"""The certificate catches a planted float operation in TIR and in machine code, each on its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax, te, tirx

from hawq_tvm.compiler import build
from hawq_tvm.core import ops, stages
from hawq_tvm.core.errors import OverflowBoundError, PackageError, StageError
from hawq_tvm.verify.certificate import certify
from relay_passes.fuse_epilogues import fuse_epilogues

from .graphs_for_verify import INT8, TARGET, compiled, graph, network


def planted(tir: tvm.IRModule, kernel: str) -> tvm.IRModule:
    """The module with one kernel that multiplies in float32 between its integer operands and results."""
    old = tir[kernel]
    shapes = [(tuple(int(d) for d in p.ty.shape), str(p.ty.dtype)) for p in old.params]
    operands = [te.placeholder(s, d, name=f"p{i}") for i, (s, d) in enumerate(shapes[:-1])]
    shape, dtype = shapes[-1]

    def element(*i: tirx.Expr) -> tirx.Expr:
        return (operands[0](*(0 for _ in operands[0].shape)).astype("float32") * 0.5).astype(dtype)

    func = te.create_prim_func([*operands, te.compute(shape, element, name="planted")])
    module = tvm.IRModule(dict(tir.functions_items()))
    module.update_func(module.get_global_var(kernel), func.with_attrs(dict(old.attrs)))
    return module


def exported(executable: relax.VMExecutable, path: Path) -> Path:
    executable.export_library(str(path))
    return path


@pytest.fixture(scope="module")
def packed() -> tvm.IRModule:
    return fuse_epilogues(network())[0]


@pytest.fixture(scope="module")
def tir_and_library(packed: tvm.IRModule, tmp_path_factory: pytest.TempPathFactory) -> tuple[tvm.IRModule, Path]:
    tir, executable = compiled(packed)
    return tir, exported(executable, tmp_path_factory.mktemp("lib") / "model.so")


def test_an_integer_network_is_certified(packed: tvm.IRModule, tir_and_library: tuple[tvm.IRModule, Path]) -> None:
    certificate = certify(packed, *tir_and_library)
    assert certificate.ok and certificate.tir_offenders == () and certificate.code_offenders == ()
    assert certificate.border == ("dequantize", "quantize") and certificate.kernels == 3
    assert min(certificate.buffers, certificate.expressions, certificate.instructions) > 50
    assert certificate.code_functions >= 6
    assert (certificate.thresholds, certificate.differing, certificate.differing_layers) == (350, 2, {"conv": 2})
    assert certificate.roundings == {"half_even": 1, "half_up": 1}
    assert [(m["layer"], m["kind"]) for m in certificate.margins] == [
        ("conv", "conv2d"),
        ("conv", "add"),
        ("conv", "requantize"),
        ("sum", "requantize"),
    ]
    assert certificate.least_margin is not None and certificate.least_margin["kind"] == "add"


def test_it_survives_json(packed: tvm.IRModule, tir_and_library: tuple[tvm.IRModule, Path]) -> None:
    certificate = certify(packed, tir_and_library[0], tir_and_library[1].read_bytes())
    stored = json.loads(json.dumps(certificate.to_dict()))
    assert stored["ok"] is True
    lists = {k: list(v) for k, v in vars(certificate).items() if isinstance(v, tuple)}
    assert stored == {**certificate.to_dict(), **lists}


def test_a_float_operation_is_caught_in_tir_and_in_the_code(
    packed: tvm.IRModule, tmp_path: Path, tir_and_library: tuple[tvm.IRModule, Path]
) -> None:
    tir, library = tir_and_library
    kernel = next(n for n, f in stages.private_functions(packed).items() if str(f.attrs["hawq.layer"]) == "pool")
    bad = planted(tir, kernel)
    bad_library = exported(build.build(bad, TARGET), tmp_path / "bad.so")
    both = certify(packed, bad, bad_library)
    assert not both.ok and both.to_dict()["ok"] is False
    assert both.tir_offenders and all(o.startswith("pool: ") and "float32" in o for o in both.tir_offenders)
    assert any("mulss" in o or "mulps" in o for o in both.code_offenders)
    assert all(o.startswith(f"{kernel}_compute_") for o in both.code_offenders)
    only_tir, only_code = certify(packed, bad, library), certify(packed, tir, bad_library)
    assert only_tir.tir_offenders and not only_tir.code_offenders and not only_tir.ok
    assert only_code.code_offenders and not only_code.tir_offenders and not only_code.ok


def test_an_unused_float_parameter_is_caught_in_tir(
    packed: tvm.IRModule, tir_and_library: tuple[tvm.IRModule, Path]
) -> None:
    tir, library = tir_and_library
    kernel = next(n for n, f in stages.private_functions(packed).items() if str(f.attrs["hawq.layer"]) == "pool")
    a, unused = te.placeholder((4,), "int8", name="a"), te.placeholder((4,), "float16", name="unused")
    func = te.create_prim_func([a, unused, te.compute((4,), lambda i: a[i], name="b")])
    module = tvm.IRModule(dict(tir.functions_items()))
    module.update_func(module.get_global_var(kernel), func)
    assert any("float16" in o for o in certify(packed, module, library).tir_offenders)


def test_a_kernel_that_is_not_there_is_an_error_not_a_pass(
    packed: tvm.IRModule, tir_and_library: tuple[tvm.IRModule, Path], tmp_path: Path
) -> None:
    tir, library = tir_and_library
    kernel = next(n for n, f in stages.private_functions(packed).items() if str(f.attrs["hawq.layer"]) == "pool")
    without = tvm.IRModule({gv: f for gv, f in tir.functions_items() if gv.name_hint != kernel})
    with pytest.raises(StageError, match="pool: has no kernel"):
        certify(packed, without, library)
    alone, _ = fuse_epilogues(graph(lambda emit, x: relax.op.nn.max_pool2d(x, (2, 2)), ((1, 2, 4, 4), "int8")))
    other = exported(compiled(alone)[1], tmp_path / "other.so")
    with pytest.raises(PackageError, match="a kernel's code is missing"):
        certify(packed, tir, other)


def test_a_function_that_mixes_border_and_integer_operators_is_not_excused(tmp_path: Path) -> None:
    def build_function() -> tvm.IRModule:
        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType((8,), "float32"))
        with builder.function("mixed", [x], attrs={"Primitive": 1, "hawq.layer": "mixed"}, private=True):
            with builder.dataflow():
                q = builder.emit(ops.quantize(x, 0.1, 0, qtype=INT8))
                y = builder.emit_output(ops.requantize([q], [3], 0, 1, qtype=INT8, zero_point=0, rounding="half_up"))
            builder.emit_func_output(y)
        module = builder.get()
        builder = relax.BlockBuilder(module)
        z = relax.Var("z", relax.TensorType((8,), "float32"))
        with builder.function("main", [z]):
            with builder.dataflow():
                v = builder.emit(relax.Call(module.get_global_var("mixed"), [z]), name_hint="mixed")
                out = builder.emit_output(relax.Tuple([v]))
            builder.emit_func_output(out)
        return builder.get()

    packed = build_function()
    tir, executable = compiled(packed)
    certificate = certify(packed, tir, exported(executable, tmp_path / "mixed.so"))
    assert certificate.border == () and not certificate.ok and certificate.tir_offenders and certificate.code_offenders


def test_a_float_tail_is_named_and_left_out(tmp_path: Path) -> None:
    def body(emit, x):
        y = emit(ops.requantize([x], [3], 0, 1, qtype=INT8, zero_point=0, rounding="half_even"), "layer")
        z = emit(ops.dequantize(y, np.float32(0.1), 0, qmin=-128, qmax=127), "z")
        return emit(relax.op.nn.softmax(z, 1), "tail")

    packed, _ = fuse_epilogues(graph(body, ((2, 5), "int8"), **{"hawq.float_tail": ["tail"]}))
    tir, executable = compiled(packed)
    certificate = certify(packed, tir, exported(executable, tmp_path / "tail.so"))
    assert certificate.ok and certificate.float_tail == ("tail",) and certificate.kernels == 1


def test_a_possible_overflow_is_not_certified(tmp_path: Path) -> None:
    overflowing, _ = fuse_epilogues(
        graph(lambda emit, x: emit(relax.op.add(x, ops.const(1, "int32")), "too_much"), ((4,), "int32"))
    )
    tir, executable = compiled(overflowing)
    with pytest.raises(OverflowBoundError, match="too_much"):
        certify(overflowing, tir, exported(executable, tmp_path / "overflow.so"))
