"""What `inspect` says of a model beside what `compile` does with it: one verdict, in the same words."""

from __future__ import annotations

from typing import Any
from unittest import mock

import hawq_tvm as ht
from hawq_tvm.compiler import build
from hawq_tvm.core.errors import HawqError
from hawq_tvm.core.printable import printable


class _Reached(BaseException):
    """Raised where the library's code would be generated, which refuses nothing and takes most of the time."""


def refusal(source: Any, **options: Any) -> HawqError | None:
    """What `compile` refuses a model with; it is compiled up to the generation of code."""
    reached = mock.Mock(side_effect=_Reached)
    with mock.patch.object(build, "build_reported", reached), mock.patch.object(build, "Objects", reached):
        try:
            ht.compile(source, **options)
        except _Reached:
            return None
        except HawqError as e:
            return e
    raise AssertionError("compile made a package without generating code")


def agreed(source: Any, **options: Any) -> HawqError | None:
    """What `compile` and `inspect` refuse a model with, None where both accept it.

    Anything but one clear sentence, and any difference between the two, is an AssertionError.
    """
    error = refusal(source, **options)
    if error is not None:
        check_sentence(str(error))
    try:
        report = ht.inspect(source, **options)
    except HawqError as e:
        assert str(e) == str(error), f"two refusals\n  inspect: {e}\n  compile: {error or 'accepts it'}"
        return error
    assert report.error == ("" if error is None else str(error)), (
        f"two verdicts\n  inspect: {report.verdict}\n  compile: {error or 'accepts it'}"
    )
    return error


def check_sentence(text: str) -> None:
    """One sentence of a length that is read, without anything of TVM's or Python's own."""
    assert len(printable(text).splitlines()) == 1 and len(text) < 2000, f"no single sentence: {text[:3000]!r}"
    assert "Traceback" not in text and "Check failed" not in text, f"an internal error: {text}"
