"""PTX statements of preprocessed CUDA source as calls of the emulator, so that the text of the instructions is what
is tested.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_STATEMENT = re.compile(r"\b(?:asm|__asm__)\s*(?:volatile|__volatile__)?\s*\(")
_STRING = re.compile(r'\s*"((?:[^"\\]|\\.)*)"')
_TOUCHES_MEMORY = ("cp.async.ca", "cp.async.cg", "cp.async.wait", "ldmatrix")


class UnknownInstruction(ValueError):
    """A PTX statement that the emulator has no meaning for, or whose operands do not fit it."""


@dataclass(frozen=True)
class Operand:
    """An operand of a statement: its constraint, "=r", "+r", "r", "l" or "n", and its expression in C++."""

    constraint: str
    value: str

    @property
    def is_read(self) -> bool:
        """Whether the instruction may read it."""
        return not self.constraint.startswith("=")

    @property
    def is_written(self) -> bool:
        """Whether the instruction may write it."""
        return self.constraint[0] in "=+"


def translate(source: str) -> str:
    """Preprocessed source with every PTX statement as a call of `cuda_on_cpu.h`.

    Raises UnknownInstruction.
    """
    found, at = [], 0
    while m := _STATEMENT.search(source, at):
        end = _closing(source, m.end() - 1)
        found += [source[at : m.start()], _call(source[m.end() : end])]
        at = end + 1
    return "".join([*found, source[at:]])


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` is closed."""
    depth, i = 0, start
    while True:
        if s := _STRING.match(text, i):
            i = s.end()
            continue
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
        i += 1


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that no bracket or string holds."""
    found, start, i = [], 0, 0
    while i < len(text):
        if s := _STRING.match(text, i):
            i = s.end()
        elif text[i] in "([{":
            i = _closing(text, i) + 1
        else:
            if text[i] == separator:
                found.append(text[start:i])
                start = i + 1
            i += 1
    return [p.strip() for p in [*found, text[start:]]]


def _call(inside: str) -> str:
    text, *sections = _split(inside, ":")
    ptx = "".join(m[1] for m in _STRING.finditer(text)).strip().rstrip(";").strip()
    outputs, inputs, clobbers = [*([p for p in _split(s, ",") if p] for s in sections), [], [], []][:3]
    operands = [_operand(o) for o in (*outputs, *inputs)]
    opcode, _, rest = ptx.partition(" ")
    if opcode.startswith(_TOUCHES_MEMORY) and '"memory"' not in clobbers:
        raise UnknownInstruction(f"{opcode} without a memory clobber: the compiler may move it")
    lists = [
        [_value(v, operands, opcode) for v in _split(group.strip("{}[]"), ",")] for group in _split(rest, ",") if group
    ]
    return f"do {{ {_meaning(opcode, lists)} }} while (0)"


def _operand(text: str) -> Operand:
    m = re.fullmatch(r'"([^"]+)"\s*\((.*)\)', text, re.DOTALL)
    if m is None:
        raise UnknownInstruction(f"not an operand: {text}")
    return Operand(m[1], m[2])


def _value(text: str, operands: list[Operand], opcode: str) -> Operand:
    if text.startswith("%"):
        return operands[int(text[1:])]
    if re.fullmatch(r"\d+", text):
        return Operand("n", text)
    raise UnknownInstruction(f"{opcode} with {text}")


def _meaning(opcode: str, lists: list[list[Operand]]) -> str:
    values = [[o.value for o in group] for group in lists]
    counts = [len(group) for group in lists]
    if m := re.fullmatch(
        r"mma\.sync\.aligned\.m(8|16)n8k(16|32|64)\.row\.col\.s32\.([us])([48])\.([us])([48])\.s32", opcode
    ):
        rows, k, bits = int(m[1]), int(m[2]), int(m[4])
        registers = 4 if rows == 16 else 1
        if (
            m[4] != m[6]
            or k * bits != (256 if rows == 16 else 128)
            or counts != [rows // 4, registers, max(1, registers // 2), rows // 4]
        ):
            raise UnknownInstruction(f"{opcode} with {counts} operands")
        d, a, b, c = lists
        if not (all(o.is_written for o in d) and all(o.is_read for o in (*a, *b, *c))):
            raise UnknownInstruction(f"{opcode}: an operand is declared as output and read, or as input and written")
        into = " ".join(f"{o.value} = hawq_c[{i}];" for i, o in enumerate(d))
        return (
            f"const unsigned hawq_a[] = {{{', '.join(values[1])}}}, hawq_b[] = {{{', '.join(values[2])}}}; int hawq_c[]"
            f" = {{{', '.join(values[3])}}}; ::hawq_emulated::mma({rows}, {k}, {bits}, {_signed(m[3])},"
            f" {_signed(m[5])}, hawq_a, hawq_b, hawq_c); {into}"
        )
    if opcode == "ldmatrix.sync.aligned.m8n8.x4.shared.b16" and counts == [4, 1]:
        into = " ".join(f"{v} = hawq_r[{i}];" for i, v in enumerate(values[0]))
        return f"unsigned hawq_r[4]; ::hawq_emulated::ldmatrix_x4(hawq_r, {values[1][0]}); {into}"
    if re.fullmatch(r"cp\.async\.c[ag]\.shared\.global(\.L2::\d+B)?", opcode) and counts in ([1, 1, 1], [1, 1, 1, 1]):
        (to,), (source,), (size,), (taken,) = [*values, values[2]][:4]
        sizes = "16" if ".cg." in opcode else f"4 || ({size}) == 8 || ({size}) == 16"
        return (
            f'static_assert(({size}) == {sizes}, "{opcode}"); ::hawq_emulated::copy_async({to}, {source}, {size},'
            f" {taken});"
        )
    if opcode == "cp.async.commit_group" and not lists:
        return "::hawq_emulated::commit_group();"
    if opcode == "cp.async.wait_group" and counts == [1]:
        return f"::hawq_emulated::wait_group({values[0][0]});"
    if (m := re.fullmatch(r"dp4a\.([us])32\.([us])32", opcode)) and counts == [1, 1, 1, 1]:
        (to,), (first,), (second,), (third,) = values
        return f"{to} = ::hawq_emulated::dp4a<{_byte(m[1])}, {_byte(m[2])}>({first}, {second}, {third});"
    raise UnknownInstruction(f"{opcode} with {counts} operands")


def _signed(letter: str) -> str:
    return "true" if letter == "s" else "false"


def _byte(letter: str) -> str:
    return "int8_t" if letter == "s" else "uint8_t"
