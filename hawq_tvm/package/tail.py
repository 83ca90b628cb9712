"""The float end of a model that was cut off, an ONNX model in the package, run by ONNX Runtime where that is
installed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from hawq_tvm.core.errors import PackageError, UsageError

Array = NDArray[Any]


class Tail:
    """The end of one package's model.

    model: the ONNX model.  where: how errors call the package.
    """

    def __init__(self, model: bytes, where: str) -> None:
        self.model, self.where = model, where
        self._session: tuple[int, Any] | None = None  # made by which process: its threads do not survive a fork

    def finished(self, given: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """The model's outputs by name, in order; given: its inputs and the library's outputs.

        Raises UsageError where ONNX Runtime is not installed, PackageError when it refuses the end or fails.
        """
        session = self._opened()
        names = [o.name for o in session.get_outputs()]
        try:
            made = session.run(None, {i.name: given[i.name] for i in session.get_inputs()})
            every = {**given, **dict(zip(names, made, strict=True))}
            return {name: every[name] for name in outputs}
        except KeyError as e:
            raise self._foreign(f"nothing gives {e}") from e
        except errors_of_onnxruntime() as e:
            raise self._foreign(str(e).strip().splitlines()[-1]) from e

    def _opened(self) -> Any:
        if self._session is None or self._session[0] != os.getpid():
            try:
                import onnxruntime
            except ImportError as e:
                raise UsageError(
                    "ends in float operators that were cut off (tail.onnx), which ONNX Runtime runs",
                    where=self.where,
                    found=str(e),
                    remedy="pip install onnxruntime, or run without the tail (--no-tail, tail=False) and give tail.onnx"
                    " the tensors at the cut",
                ) from e
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            # More would round what a quantize between dequantizes rounds in another way.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            try:
                made = onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
            except errors_of_onnxruntime() as e:
                raise self._foreign(str(e).strip().splitlines()[-1]) from e
            self._session = os.getpid(), made
        return self._session[1]

    def _foreign(self, found: str) -> PackageError:
        return PackageError(
            "has a float end (tail.onnx) that ONNX Runtime refuses",
            where=self.where,
            found=found,
            remedy="install a newer ONNX Runtime, or run without the tail (--no-tail, tail=False)",
        )


def errors_of_onnxruntime() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; the classes have no base of their own but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception)]
    return (RuntimeError, ValueError, *own)
