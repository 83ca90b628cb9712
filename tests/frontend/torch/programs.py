"""Quantized PyTorch programs for the tests: single operators between quantizes written by hand, and small nets
through PT2E.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'hawq-tvm[torch]'")
pytest.importorskip("torch.ao.quantization.fx._decomposed")  # registers the operators of PT2E

Q = torch.ops.quantized_decomposed
IN_SCALE, IN_ZERO = float(np.float32(0.0437)), 117
OUT_SCALE, OUT_ZERO = float(np.float32(0.0291)), 131


def quantize(x: Any, scale: float, zero: int) -> Any:
    return Q.quantize_per_tensor(x, scale, zero, 0, 255, torch.uint8)


def dequantize(q: Any, scale: float, zero: int) -> Any:
    return Q.dequantize_per_tensor(q, scale, zero, 0, 255, torch.uint8)


class Between(torch.nn.Module):  # type: ignore[misc]
    """Every input quantized, a function of the operands, every result quantized."""

    def __init__(self, function: Callable[..., Any], out_scale: float = OUT_SCALE) -> None:
        super().__init__()
        self.function, self.out_scale = function, out_scale

    def forward(self, *xs: Any) -> Any:
        ys = self.function(*(dequantize(quantize(x, IN_SCALE, IN_ZERO), IN_SCALE, IN_ZERO) for x in xs))
        return tuple(quantize(y, self.out_scale, OUT_ZERO) for y in (ys if isinstance(ys, tuple | list) else (ys,)))


def weight(shape: Sequence[int], scale: float = 0.011, bits: int = 8, seed: int = 0) -> Any:
    """A module that gives a dequantized weight with one scale per output channel (axis 0)."""
    rng, top = np.random.default_rng(seed), 2 ** (bits - 1) - 1

    class Weight(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("q", torch.tensor(rng.integers(-top - 1, top + 1, shape).astype(np.int8)))
            self.register_buffer("s", torch.tensor((scale * rng.uniform(0.4, 1, shape[0])).astype(np.float32)))
            self.register_buffer("z", torch.zeros(shape[0], dtype=torch.int64))

        def forward(self) -> Any:
            return Q.dequantize_per_channel(self.q, self.s, self.z, 0, -top - 1, top, torch.int8)

    return Weight()


def export(model: Any, *shapes: Sequence[int], **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model.eval(), tuple(torch.zeros(*s) for s in shapes), **options)


# -- PT2E ------------------------------------------------------------------------------------------------------


class Residual(torch.nn.Module):  # type: ignore[misc]
    """Two convolutions with BatchNorm, a residual addition, pools and a classifier; ReLU in place, as everybody
    writes it.
    """

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8))
        self.act, self.third = nn.ReLU(inplace=True), nn.Conv2d(8, 16, 3, stride=2)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x: Any) -> Any:
        y = self.first(x)
        y = self.act(self.second(y) + y)
        return self.fc(torch.flatten(self.pool(self.third(y).relu()), 1))


def lively(model: Any, shape: Sequence[int]) -> Any:
    """A model with BatchNorm parameters and statistics that quantization can see; in evaluation mode."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.uniform_(layer.bias, -0.5, 0.5)
            layer.momentum = 0.5
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(*shape))
    return model.eval()


def _xnnpack(**options: Any) -> Any:
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**options))


def _inductor(name: str, **options: Any) -> Any:
    from importlib import import_module

    module = import_module(f"torchao.quantization.pt2e.quantizer.{name}_inductor_quantizer")
    quantizer = getattr(module, f"{name.capitalize()}InductorQuantizer")()
    return quantizer.set_global(getattr(module, f"get_default_{name}_inductor_quantization_config")(**options))


QUANTIZERS: dict[str, Callable[[], Any]] = {
    "x86 inductor": lambda: _inductor("x86"),
    "arm inductor": lambda: _inductor("arm"),
    "x86 inductor qat": lambda: _inductor("x86", is_qat=True),
    "xnnpack per tensor": lambda: _xnnpack(is_per_channel=False),
    "xnnpack per channel": lambda: _xnnpack(is_per_channel=True),
    "xnnpack qat": lambda: _xnnpack(is_per_channel=True, is_qat=True),
    "xnnpack dynamic": lambda: _xnnpack(is_dynamic=True),
    "xnnpack 4-bit weights": lambda: _xnnpack(is_per_channel=True, weight_qmin=-8, weight_qmax=7),
    "xnnpack 4 bits": lambda: _xnnpack(is_per_channel=True, weight_qmin=-8, weight_qmax=7, act_qmin=-8, act_qmax=7),
}


def pt2e(name: str, model: Any, shape: Sequence[int], *, fold: bool = True, batches: int = 3) -> Any:
    """An ExportedProgram as a user of PT2E gets it: exported, prepared, calibrated (or trained a little), converted,
    exported.
    """
    pytest.importorskip("torchao", reason="torchao is not installed: pip install --no-deps torchao")
    from torchao.quantization import pt2e as package
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

    qat = name.endswith("qat")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model.train() if qat else model.eval(), (torch.randn(*shape),)).module()
        prepared = (prepare_qat_pt2e if qat else prepare_pt2e)(exported, QUANTIZERS[name]())
        for _ in range(batches):
            prepared(torch.randn(*shape))
        if qat:
            package.move_exported_model_to_eval(prepared)
        return torch.export.export(convert_pt2e(prepared, fold_quantize=fold), (torch.randn(*shape),))
