"""PyTorch as a peer: it reads no ONNX, so it runs the float network that one of zoo.NETWORKS was made from, in three
ways.

torch: float32, eager.  torch-bf16: bfloat16 in channels-last order, compiled by Inductor.  torch-int8: quantized by
PT2E with the x86 quantizer's own settings, compiled by Inductor.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawq_tvm.core.errors import ModelError, UsageError

from . import zoo
from .engine import CannotRun, last_line, missing

Array = NDArray[Any]


class Torch:
    """The float32 network, eager; the variants below replace `_made`."""

    name, package, extra = "torch", "torch", "torch"
    what = "the float32 network it was quantized from, eager"
    _before = 0  # PyTorch's number of threads before `prepare`; 0: it has not been changed

    @property
    def version(self) -> str:
        """The installed version."""
        import torch

        return str(torch.__version__)

    def prepare(self, model: Path, inputs: Mapping[str, Array], threads: int) -> None:
        """See Engine; the network is known by the model file's name, as zoo writes it, and checked by its outputs."""
        net, x = float_network(self.name, model, inputs)
        import torch

        self._before = torch.get_num_threads()
        torch.set_num_threads(threads)
        self._torch, self._x = torch, torch.from_numpy(x)
        self._net = self._made(net, self._x)

    def _made(self, net: Any, x: Any) -> Any:
        """The function to time, of the float network and its input."""
        del x
        return net

    def call(self) -> None:
        """One inference."""
        with self._torch.inference_mode():
            self._y = self._net(self._x)

    def outputs(self) -> dict[str, Array]:
        """The output of the last `call`, under the name that zoo gives it."""
        return {"output": self._y.numpy()}

    def close(self) -> None:
        """Give back PyTorch's number of threads."""
        if self._before:
            self._torch.set_num_threads(self._before)


class TorchBf16(Torch):
    """The network in bfloat16 and channels-last order, compiled by Inductor with frozen weights."""

    name, what = "torch-bf16", "the network it was quantized from in bfloat16, channels last, compiled by Inductor"

    def _made(self, net: Any, x: Any) -> Any:
        import torch

        inner = net.to(torch.bfloat16).to(memory_format=torch.channels_last)

        class Cast(torch.nn.Module):
            """From float32 to float32, as everybody else."""

            def __init__(self) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Any) -> Any:
                return self.inner(x.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)).float()

        return compiled(self.name, Cast().eval(), x)


class TorchInt8(Torch):
    """The network in channels-last order, quantized by PT2E as a user of PyTorch does it, compiled by Inductor with
    frozen weights.
    """

    name, package = "torch-int8", "torchao"
    what = (
        "the network it was quantized from, quantized by PT2E (X86InductorQuantizer), channels last, compiled by"
        " Inductor"
    )

    def _made(self, net: Any, x: Any) -> Any:
        import torch

        with _quiet():
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
            from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

            quantizer = x86.X86InductorQuantizer()
            quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
            last = net.to(memory_format=torch.channels_last)
            try:
                with torch.no_grad():
                    prepared = prepare_pt2e(torch.export.export(last, (x,)).module(), quantizer)
                    for batch in zoo.calibration(len(x), x.shape[2]):
                        prepared(torch.from_numpy(batch))
                    quantized = convert_pt2e(prepared)
            except RuntimeError as e:
                raise CannotRun("PyTorch cannot quantize this network", where=self.name, found=last_line(e)) from e
        return compiled(self.name, quantized, x)


def float_network(engine: str, model: Path, inputs: Mapping[str, Array]) -> tuple[Any, Array]:
    """The float network of the zoo, as a torch module, that a quantized model was made of, and its input.

    Raises UsageError where the file's name is none of the zoo's or a package lacks, ModelError for other inputs.
    """
    network = zoo_network(model)
    for package in ("torch", "pytorchcv"):
        if importlib.util.find_spec(package) is None:
            raise missing(engine, package, Torch.extra)
    x = next(iter(inputs.values()))
    if len(inputs) != 1 or x.ndim != 4 or x.shape[1] != 3 or x.shape[2] != x.shape[3] or x.dtype != np.float32:
        raise ModelError(
            "does not have the input of a network of the zoo",
            where=str(model),
            expected="float32 N x 3 x S x S",
            found=f"{x.dtype} {x.shape}",
        )
    return zoo.build(network, x.shape[2]), x


def compiled(name: str, net: Any, x: Any) -> Any:
    """A module compiled by Inductor, with frozen weights, for inputs like x; it is compiled before this returns.

    Raises CannotRun when Inductor fails, for want of a C++ compiler for example.
    """
    import torch
    import torch._dynamo
    import torch._inductor.config as inductor

    # In this process: workers of its own would stay and could disturb what is measured.
    with _quiet(), inductor.patch(freezing=True, compile_threads=1), torch.inference_mode():
        torch._dynamo.reset()
        function = torch.compile(net, dynamic=False)
        try:
            function(x)
        except RuntimeError as e:  # what Dynamo and Inductor raise derives from it
            raise CannotRun("PyTorch cannot compile this network", where=name, found=last_line(e)) from e
    return function


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that PyTorch and torchao give about their own deprecations and missing GPU libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def zoo_network(model: Path) -> str:
    """The network of the zoo that a file `NETWORK.onnx` or `NETWORK_anything.onnx` holds.

    Raises UsageError for another name.
    """
    for name in sorted(zoo.NETWORKS, key=len, reverse=True):
        if model.stem == name or model.stem.startswith((f"{name}_", f"{name}-", f"{name}.")):
            return name
    raise UsageError(
        "float networks are those of hawq_tvm.bench.zoo alone, known by the model file's name",
        where="--against",
        expected=f"{', '.join(f'{n}*.onnx' for n in sorted(zoo.NETWORKS))}",
        found=model.name,
        remedy="leave torch and openvino-bf16 out for other models",
    )
