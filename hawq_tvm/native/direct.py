"""A library of this machine's architecture, called through its C interface by ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PackageError
from .records import Record, Run
from .toolchain import ABI_VERSION

Array = NDArray[Any]


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t), ("dtype", ctypes.c_char_p), ("rank", ctypes.c_int),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
    )  # fmt: skip


class _Options(ctypes.Structure):
    _fields_ = (("threads", ctypes.c_int),)


_OBSERVER = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_Tensor), ctypes.c_int, ctypes.POINTER(_Tensor), ctypes.c_int
)  # fmt: skip


class Model:
    """A model of a library (`hawq_model_create`), destroyed by `close`.

    library: the file.  threads: that take part in a run, 0 for all processors.
    Raises PackageError with the library's own sentence when it refuses.
    """

    def __init__(self, library: Path, threads: int = 0) -> None:
        self._library = _declared(ctypes.CDLL(str(library)))
        if self._library.hawq_abi_version() != ABI_VERSION:
            raise PackageError("has another C interface", where=str(library), expected=str(ABI_VERSION), found=str(self._library.hawq_abi_version()))
        self._model = self._library.hawq_model_create(ctypes.byref(_Options(threads)))
        if not self._model:
            raise self._error("the model cannot be created")

    def _error(self, what: str) -> PackageError:
        return PackageError(what, where="the C interface", found=self._library.hawq_error().decode())

    def set_inputs(self, arrays: Sequence[Array]) -> None:
        """Copy the inputs, in the order of the model and as the package takes them, into the model.

        Raises PackageError where the library takes others than the package says.
        """
        wanted = [self._library.hawq_model_input_tensor(self._model, i)[0] for i in range(self._library.hawq_model_inputs(self._model))]
        ready = [np.ascontiguousarray(a).reshape(a.shape) for a in arrays]
        expected, found = ([f"{kind}{list(shape)}" for kind, shape, _ in side] for side in (map(_kind, wanted), ((a.dtype.name, a.shape, a.nbytes) for a in ready)))
        if expected != found or [t.bytes for t in wanted] != [a.nbytes for a in ready]:
            raise PackageError(
                "the library takes other inputs than the manifest says", where="the C interface", expected=", ".join(expected), found=", ".join(found),
                remedy="do not use it; get it again from whom you trust, or compile again",
            )  # fmt: skip
        for i, array in enumerate(ready):
            ctypes.memmove(self._library.hawq_model_input(self._model, i), array.ctypes.data, array.nbytes)

    def run(self) -> None:
        """One inference of what the inputs hold.

        Raises PackageError when a kernel fails.
        """
        if self._library.hawq_model_run(self._model):
            raise self._error("the run failed")

    def outputs(self) -> tuple[Array, ...]:
        """Copies of the outputs."""
        return tuple(_array(self._library.hawq_model_output_tensor(self._model, i)[0]) for i in range(self._library.hawq_model_outputs(self._model)))

    def watched(self, arrays: Sequence[Array]) -> Run:
        """One inference of given inputs, with what every kernel read and wrote."""
        records: list[Record] = []

        @_OBSERVER
        def observe(_: Any, kernel: bytes, read: Any, reads: int, written: Any, writes: int) -> None:
            records.append(Record(kernel.decode(), tuple(map(_array, read[:reads])), tuple(map(_array, written[:writes]))))

        self.set_inputs(arrays)
        self._library.hawq_model_observe(self._model, observe, None)
        try:
            self.run()
        finally:
            self._library.hawq_model_observe(self._model, _OBSERVER(), None)
        return Run(tuple(records), self.outputs())

    def close(self) -> None:
        """Give the model's memory and threads back."""
        if self._model:
            self._library.hawq_model_destroy(self._model)
            self._model = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def watched(library: Path, arrays: Sequence[Array]) -> Run:
    """One inference of given inputs in a model of its own, with what every kernel read and wrote; see `Model.watched`."""
    with Model(library) as model:
        return model.watched(arrays)


def _kind(t: _Tensor) -> tuple[str, tuple[int, ...], int]:
    """A buffer's type, shape and bytes."""
    return t.dtype.decode(), tuple(t.shape[i] for i in range(t.rank)), t.bytes


def _array(t: _Tensor) -> Array:
    shape = tuple(t.shape[i] for i in range(t.rank))
    return np.frombuffer(ctypes.string_at(t.data, t.bytes), np.dtype(t.dtype.decode())).reshape(shape)


def _declared(library: Any) -> Any:
    """The functions of deploy/native/abi.h with their types."""
    model, number, tensor = ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Tensor)
    for name, result, arguments in (
        ("hawq_abi_version", number, []), ("hawq_version", ctypes.c_char_p, []), ("hawq_error", ctypes.c_char_p, []),
        ("hawq_model_create", model, [ctypes.POINTER(_Options)]), ("hawq_model_destroy", None, [model]),
        ("hawq_model_inputs", number, [model]), ("hawq_model_outputs", number, [model]), ("hawq_model_threads", number, [model]),
        ("hawq_model_input", ctypes.c_void_p, [model, number]), ("hawq_model_output", ctypes.c_void_p, [model, number]),
        ("hawq_model_input_tensor", tensor, [model, number]), ("hawq_model_output_tensor", tensor, [model, number]),
        ("hawq_model_run", number, [model]), ("hawq_model_observe", number, [model, _OBSERVER, ctypes.c_void_p]),
    ):  # fmt: skip
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
