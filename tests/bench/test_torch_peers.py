"""PyTorch as a peer: which models it knows, what it gives back, and its compiled variants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hawq_tvm.bench import peers, torch_peers
from hawq_tvm.bench.engine import CannotRun
from hawq_tvm.core.errors import ModelError, UsageError

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'hawq-tvm[torch]')")
pytest.importorskip("pytorchcv", reason="pytorchcv is not installed (pip install 'hawq-tvm[torch]')")

X = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)


def test_torch_runs_the_zoo_alone() -> None:
    assert torch_peers.zoo_network(Path("a/resnet50_b8_qdq.onnx")) == "resnet50"
    assert torch_peers.zoo_network(Path("inceptionv3.onnx")) == "inceptionv3"
    for name in ("resnet500.onnx", "tiny.onnx"):
        with pytest.raises(UsageError, match="float networks are those"):
            torch_peers.zoo_network(Path(name))


def test_torch_gives_its_threads_back() -> None:
    before = torch.get_num_threads()
    engine = torch_peers.Torch()
    engine.prepare(Path("resnet18_qdq.onnx"), {"input": X}, before + 1)
    assert torch.get_num_threads() == before + 1
    engine.call()
    assert engine.outputs()["output"].shape == (1, 1000) and engine.version == torch.__version__
    engine.close()
    assert torch.get_num_threads() == before
    with pytest.raises(ModelError, match="float32 N x 3 x S x S"):
        torch_peers.Torch().prepare(Path("resnet18.onnx"), {"input": X[:, :2]}, 1)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [torch_peers.TorchBf16, torch_peers.TorchInt8])
def test_compiled_variants_run_the_same_network(variant: type[torch_peers.Torch]) -> None:
    pytest.importorskip(variant.package, reason=f"{variant.package} is not installed (pip install 'hawq-tvm[torch]')")
    plain, engine = torch_peers.Torch(), variant()
    for e in (plain, engine):
        e.prepare(Path("resnet18.onnx"), {"input": X}, 1)
        e.call()
    a, b = (e.outputs()["output"] for e in (plain, engine))
    for e in (engine, plain):
        e.close()
    # The float network is another arithmetic: 8 significant bits, or 8-bit data, of 18 layers leave the outputs
    # related, not equal.
    assert b.dtype == np.float32 and np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.98 and (a != b).any()


def test_openvino_runs_the_float_network_in_bfloat16() -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed (pip install 'hawq-tvm[bench]')")
    engine, plain = peers.OpenVinoBf16(), torch_peers.Torch()
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(CannotRun, match="openvino-bf16: this CPU has no bfloat16"):
            engine.prepare(Path("resnet18.onnx"), {"input": X}, 1)
        return
    for e in (plain, engine):
        e.prepare(Path("resnet18.onnx"), {"input": X}, 1)
        e.call()
    a, b = (e.outputs()["output"] for e in (plain, engine))
    # another arithmetic, of 8 significant bits
    assert b.dtype == np.float32 and np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.98 and (a != b).any()


def test_what_inductor_cannot_compile_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(net: object, **options: object) -> object:
        def fails(x: object) -> None:
            raise RuntimeError("several lines\nno compiler")

        return fails

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(CannotRun, match="torch-bf16: PyTorch cannot compile this network; found no compiler"):
        torch_peers.TorchBf16().prepare(Path("resnet18.onnx"), {"input": X}, 1)
