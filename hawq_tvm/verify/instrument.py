"""TVM's virtual machine with somebody watching every call, and without again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tvm_ffi
from tvm import relax

# What an instrument returns for a call that it made itself: the virtual machine then leaves it out.
CALLED = 1


@tvm_ffi.register_global_func("hawq_tvm.no_instrument", override=True)
def _no_instrument() -> None:
    """The factory of no instrument at all."""


def clear(vm: relax.VirtualMachine) -> None:
    """Take the instrument away.

    `set_instrument` refuses None, and an empty function in its place would make Python objects of the arguments of
    every later call; the name of a factory that returns None does take it away.
    """
    vm.set_instrument("hawq_tvm.no_instrument")


@contextmanager
def watched(vm: relax.VirtualMachine, observe: Callable[..., Any]) -> Iterator[None]:
    """`observe` sees every call of the virtual machine while this lasts; see `VirtualMachine.set_instrument`."""
    vm.set_instrument(observe)
    try:
        yield
    finally:
        clear(vm)
