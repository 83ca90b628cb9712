"""The other runtimes that a measurement can compare with, each behind the same four calls.

Every peer gets the inputs once, before any timing, and leaves its outputs where they are: only the inference is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError, UsageError
from . import zoo

Array = NDArray[Any]


class Engine(Protocol):
    """What can be timed.

    name, version: for the report.  what: which model it ran and how, in a few words.
    """

    name: str
    what: str

    @property
    def version(self) -> str: ...

    def prepare(self, model: Path, inputs: Mapping[str, Array], threads: int) -> None:
        """Load the model for inputs of exactly these shapes and with so many threads."""

    def call(self) -> None:
        """One inference."""

    def outputs(self) -> dict[str, Array]:
        """The outputs of the last `call` by name."""

    def close(self) -> None:
        """Give back what was taken of the process, its settings included."""


class OpenVino:
    """Intel's runtime, tuned for latency with one stream."""

    name, package, extra = "openvino", "openvino", "bench"
    what = "the same quantized model"

    @property
    def version(self) -> str:
        """The installed version."""
        import openvino

        return str(openvino.get_version()).split("-")[0]

    def prepare(self, model: Path, inputs: Mapping[str, Array], threads: int) -> None:
        """See Engine."""
        import openvino

        core = openvino.Core()
        # Pinning is done for every engine alike, from outside.
        options = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
        try:
            compiled = core.compile_model(core.read_model(str(model)), "CPU", options)
        except RuntimeError as e:
            raise _refused(self.name, model, e) from e
        self._request = compiled.create_infer_request()
        # What its float layers compute in is its own choice, bfloat16 where the CPU has it: a user gets the same.
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.what = f"the same quantized model, what is float in it as {precision}"
        self._names = [sorted(o.get_names()) for o in compiled.outputs]
        for port in compiled.inputs:
            name = next(n for n in inputs if n in port.get_names())
            self._request.set_tensor(port, openvino.Tensor(inputs[name], shared_memory=True))

    def call(self) -> None:
        """One inference."""
        self._request.infer()

    def outputs(self) -> dict[str, Array]:
        """The outputs of the last `call` by name; a tensor of several names comes under each."""
        return {n: np.array(self._request.get_output_tensor(i).data) for i, names in enumerate(self._names) for n in names}

    def close(self) -> None:
        """Nothing: the threads end with the object."""


class OnnxRuntime:
    """Microsoft's runtime with its CPU provider and all graph optimizations."""

    name, package, extra = "onnxruntime", "onnxruntime", "bench"
    what = "the same quantized model"

    @property
    def version(self) -> str:
        """The installed version."""
        import onnxruntime

        return str(onnxruntime.__version__)

    def prepare(self, model: Path, inputs: Mapping[str, Array], threads: int) -> None:
        """See Engine."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except (RuntimeError, ValueError) as e:
            raise _refused(self.name, model, e) from e
        self._binding = self._session.io_binding()
        for name, value in inputs.items():
            self._binding.bind_cpu_input(name, value)
        self._names = [o.name for o in self._session.get_outputs()]
        for name in self._names:
            self._binding.bind_output(name)

    def call(self) -> None:
        """One inference."""
        self._session.run_with_iobinding(self._binding)

    def outputs(self) -> dict[str, Array]:
        """The outputs of the last `call` by name."""
        return dict(zip(self._names, self._binding.copy_outputs_to_cpu(), strict=True))

    def close(self) -> None:
        """Nothing: the threads end with the object."""


class Torch:
    """PyTorch, eager, in float32: it reads no ONNX, so it runs the float network that one of zoo.NETWORKS was made from."""

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
        network = zoo_network(model)
        if importlib.util.find_spec("pytorchcv") is None:
            raise _missing(self.name, "pytorchcv", self.extra)
        import torch

        x = next(iter(inputs.values()))
        if len(inputs) != 1 or x.ndim != 4 or x.shape[1] != 3 or x.shape[2] != x.shape[3] or x.dtype != np.float32:
            raise ModelError("does not have the input of a network of the zoo", where=str(model), expected="float32 N x 3 x S x S", found=f"{x.dtype} {x.shape}")
        self._before = torch.get_num_threads()
        torch.set_num_threads(threads)
        self._torch, self._net, self._x = torch, zoo.build(network, x.shape[2]), torch.from_numpy(x)

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


PEERS: dict[str, Callable[[], Any]] = {c.name: c for c in (OpenVino, OnnxRuntime, Torch)}


def parse(text: str) -> list[str]:
    """Peers' names from `a,b`, each once.

    Raises UsageError for an unknown name, and for a peer whose package is not installed.
    """
    names = list(dict.fromkeys(n.strip() for n in text.split(",") if n.strip()))
    for name in names:
        if name not in PEERS:
            raise UsageError("no such engine to compare with", where="--against", found=name, expected=", ".join(PEERS))
    if not names:
        raise UsageError("no engine is named", where="--against", expected=f"some of {', '.join(PEERS)}")
    for name in names:
        peer: Any = PEERS[name]
        if importlib.util.find_spec(peer.package) is None:
            raise _missing(name, peer.package, peer.extra)
    return names


def zoo_network(model: Path) -> str:
    """The network of the zoo that a file `NETWORK.onnx` or `NETWORK_anything.onnx` holds.

    Raises UsageError for another name.
    """
    for name in sorted(zoo.NETWORKS, key=len, reverse=True):
        if model.stem == name or model.stem.startswith((f"{name}_", f"{name}-", f"{name}.")):
            return name
    raise UsageError(
        "PyTorch reads no ONNX and runs only the float networks of hawq_tvm.bench.zoo, known by the model file's name", where="--against torch",
        expected=f"{', '.join(f'{n}*.onnx' for n in sorted(zoo.NETWORKS))}", found=model.name, remedy="leave torch out for other models",
    )  # fmt: skip


def _missing(name: str, package: str, extra: str) -> UsageError:
    return UsageError(f"the package {package} is not installed", where=f"--against {name}", remedy=f"pip install 'hawq-tvm[{extra}]'")


def _refused(name: str, model: Path, error: Exception) -> ModelError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ModelError(f"{name} does not accept this model", where=str(model), found=lines[-1] if lines else type(error).__name__, remedy=f"leave {name} out of --against")
