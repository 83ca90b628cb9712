"""What ends a check: one sentence and an exit code."""

from __future__ import annotations


class Refusal(Exception):
    """Something that a person must change before the check can run; `exit_code` ends the program."""

    def __init__(self, sentence: str, exit_code: int = 3) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


# What a failing step of a measurement raises: by TVM, PyTorch, the driver (through `Refusal`), and NumPy.
FAILURES = (
    Refusal,
    RuntimeError,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    MemoryError,
    ImportError,
    KeyError,
    IndexError,
)


def sentence(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cuda = [line for line in lines if "CUDA" in line]
    return f"{type(error).__name__}: {(cuda or lines or ['no message'])[-1]}"
