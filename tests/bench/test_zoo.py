"""The zoo's command: the float network of a name, for whoever quantizes it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from hawq_tvm.bench import zoo


def test_the_command_writes_a_float_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "made" / "float.onnx"
    monkeypatch.setattr("sys.argv", ["zoo", "resnet18", "--float", "--size", "32", "-o", str(path)])
    assert zoo.main() == 0
    kinds = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert "Conv" in kinds and not any("Quantize" in kind for kind in kinds)


def test_a_float_network_has_no_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["zoo", "resnet18", "--float", "--weight-bits", "4", "-o", str(tmp_path / "net.onnx")]
    )
    with pytest.raises(SystemExit):
        zoo.main()
    assert not list(tmp_path.iterdir())
