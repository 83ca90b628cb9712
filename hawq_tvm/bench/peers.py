"""The other runtimes that a measurement can compare with, each behind the same four calls.

Every peer gets the inputs once, before any timing, and leaves its outputs where they are: only the inference is timed.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import filterfalse
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawq_tvm.core.errors import UsageError

from . import zoo
from .engine import CannotRun, missing, refused
from .packaged import C, is_package
from .torch_peers import Torch, TorchBf16, TorchInt8, float_network, zoo_network

Array = NDArray[Any]


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
        self._compile(core, core.read_model(str(model)), model, inputs, threads)
        # What its float layers compute in is its own choice, bfloat16 where the CPU has it: a user gets the same.
        self.what = f"the same quantized model, what is float in it as {self._precision}"

    def _compile(
        self,
        core: Any,
        network: Any,
        model: Path,
        inputs: Mapping[str, Array],
        threads: int,
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Make a request of a network that was read; more: options beside those that every measurement has."""
        import openvino

        # Pinning is done for every engine alike, from outside.
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,
            **more,
        }
        try:
            compiled = core.compile_model(network, "CPU", options)
        except RuntimeError as e:
            raise refused(self.name, model, e) from e
        self._request = compiled.create_infer_request()
        self._precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self._names = [sorted(o.get_names()) for o in compiled.outputs]
        for port in compiled.inputs:
            name = next(n for n in inputs if n in port.get_names())
            self._request.set_tensor(port, openvino.Tensor(inputs[name], shared_memory=True))

    def call(self) -> None:
        """One inference."""
        self._request.infer()

    def outputs(self) -> dict[str, Array]:
        """The outputs of the last `call` by name; a tensor of several names comes under each."""
        return {
            n: np.array(self._request.get_output_tensor(i).data) for i, names in enumerate(self._names) for n in names
        }

    def close(self) -> None:
        """Nothing: the threads end with the object."""


class OpenVinoBf16(OpenVino):
    """The float network in bfloat16, which users have today who do not quantize."""

    name = "openvino-bf16"
    what = "the float network it was quantized from, in bfloat16"

    def prepare(self, model: Path, inputs: Mapping[str, Array], threads: int) -> None:
        """See Engine; raises CannotRun where the CPU has no bfloat16."""
        import openvino

        core = openvino.Core()
        if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise CannotRun("this CPU has no bfloat16", where=self.name)
        net, x = float_network(self.name, model, inputs)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "float.onnx"
            zoo.export(net, path, len(x), x.shape[2])
            network = core.read_model(str(path))
            self._compile(core, network, model, {"input": x}, threads, {"INFERENCE_PRECISION_HINT": "bf16"})


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
            raise refused(self.name, model, e) from e
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


FLOAT: dict[str, Callable[[], Any]] = {c.name: c for c in (OpenVinoBf16, Torch, TorchBf16, TorchInt8)}
PEERS: dict[str, Callable[[], Any]] = {OpenVino.name: OpenVino, OnnxRuntime.name: OnnxRuntime, **FLOAT}


def _is_ours(name: str) -> bool:
    """Whether a name after --against means a package, or the C interface of the one that is measured."""
    return name == C or is_package(name)


def parse(text: str) -> list[str]:
    """Peers' names and packages' paths from `a,b`, each once.

    Raises UsageError for an unknown name, and for a peer whose package is not installed.
    """
    names = list(dict.fromkeys(n.strip() for n in text.split(",") if n.strip()))
    known = f"{C}, {', '.join(PEERS)}, or a package's folder"
    if not names:
        raise UsageError("no engine is named", where="--against", expected=f"some of {known}")
    for name in filterfalse(_is_ours, names):
        if name not in PEERS:
            raise UsageError("no such engine to compare with", where="--against", found=name, expected=known)
        peer: Any = PEERS[name]
        if importlib.util.find_spec(peer.package) is None:
            raise missing(name, peer.package, peer.extra)
    return names


def check_needs(names: Sequence[str], model: Path | None) -> None:
    """Whether there is a model for every named runtime that reads one; packages need none.

    Raises UsageError.
    """
    runtimes = list(filterfalse(_is_ours, names))
    if runtimes and model is None:
        raise UsageError(
            f"{', '.join(runtimes)} must be given the ONNX model",
            where="--against",
            expected="--model MODEL.onnx",
            remedy="add it, or name packages only",
        )
    for name in runtimes:
        if model is not None and name in FLOAT:
            zoo_network(model)
