"""A program as Python functions: two for each block, one for all threads and one under a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import arithmetic
from .arithmetic import SIGNED, UNSIGNED, Array
from .control_flow import between, meetings
from .instructions import FORMS, SIZES, TOGETHER, Form, Site
from .ptx import (
    Address,
    Block,
    Instruction,
    Literal,
    Operand,
    Pair,
    Program,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)
from .threads import SPECIAL

_FLOATS: dict[str, Any] = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
# A program with one of these uses the async proxy.
_ASYNCHRONOUS = ("mbarrier.", "wgmma.", "cp.async.bulk.")


class _Misfit(Exception):
    """Operands of another shape than a form's."""


def dtype_of(kind: str) -> Any:
    """The numpy type of a PTX type; bf16 values travel as fp32."""
    if kind == "pred":
        return np.bool_
    if kind == "bf16":
        return np.float32
    if kind in _FLOATS:
        return _FLOATS[kind]
    return (SIGNED if kind[0] == "s" else UNSIGNED)[SIZES[kind]]


class Code:
    """A program's functions of (machine, registers, constants, mask), by block.

    Attributes:
        program: what they were made of.
        asynchronous: whether an instruction uses the async proxy.
        together: whether a block has instructions that a warp, or a program, executes as one.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.asynchronous = any(
            instruction.opcode.startswith(_ASYNCHRONOUS)
            for block in program.blocks
            for instruction in block.instructions
        )
        self.together = [_is_together(block) for block in program.blocks]
        self._constants: dict[tuple[int, str], int] = {}
        self._space: dict[str, Any] = {"where": np.where, **vars(arithmetic)}
        self._made: dict[int, list[Array]] = {}
        self._meetings = meetings(program)
        self._may_part: dict[int, bool] = {}
        self._functions: dict[tuple[int, bool], Callable[..., None]] = {}
        # Written at once, so that an unknown instruction is an error before anything is executed.
        self._sources = [
            [line for one in block.instructions for line in self._instruction(one, masked=False)]
            for block in program.blocks
        ]

    def function(self, number: int, masked: bool) -> Callable[..., None]:
        """A block's, for all threads or for those of a mask; compiled when it is first needed."""
        key = (number, masked)
        if key not in self._functions:
            lines = self._sources[number]
            if masked:
                instructions = self.program.blocks[number].instructions
                lines = [line for one in instructions for line in self._instruction(one, True)]
            body = "\n    ".join([*lines, "pass"])
            source = f"def block_{number}(m, R, K, M):\n    {body}\n"
            exec(compile(source, f"<{self.program.name}>", "exec"), self._space)
            self._functions[key] = self._space[f"block_{number}"]
        return self._functions[key]

    def constants(self, lanes: int) -> list[Array]:
        """The program's numbers, one element a thread."""
        found = self._made.setdefault(lanes, [])
        # Functions that are compiled later may bring more of them.
        for bits, kind in list(self._constants)[len(found) :]:
            if kind == "pred":
                found.append(np.full(lanes, bool(bits)))
                continue
            raw = np.full(lanes, bits, UNSIGNED[SIZES[kind]])
            number = arithmetic.bf16_to_f32(raw) if kind == "bf16" else raw.view(dtype_of(kind))
            found.append(number)
        return found

    def may_part(self, number: int) -> bool:
        """Whether nothing between a block's branch and where it meets needs a warp as a whole."""
        if number not in self._may_part:
            blocks = between(self.program, number, self._meetings[number])
            self._may_part[number] = not any(self.together[one] for one in blocks)
        return self._may_part[number]

    # -- instructions

    def _instruction(self, instruction: Instruction, masked: bool) -> list[str]:
        misfits = []
        for form in FORMS.get(instruction.opcode, ()):
            try:
                return self._form(form, instruction, masked)
            except _Misfit as misfit:
                misfits.append(str(misfit))
        why = "; ".join(misfits) or "the table of instructions has no such opcode"
        raise NotImplementedError(f"{self.program.name}: {instruction}: {why}")

    def _form(self, form: Form, instruction: Instruction, masked: bool) -> list[str]:
        results, arguments = (part.split() for part in form.line.types.split("="))
        given = list(instruction.operands)
        targets = [given.pop(0) for _ in results] if len(given) >= len(results) else []
        if len(targets) != len(results):
            raise _Misfit("too few operands")
        lines, mask = [], "M" if masked else "None"
        if instruction.guard is not None:
            register = f"R[{instruction.guard.register.place}]"
            negation = "~" if instruction.guard.negated else ""
            lines.append(f"g = {negation}{register}{' & M' if masked else ''}")
            mask = "g"
        shape = targets or [o for o in given if isinstance(o, Vector)]
        count = len(_parts(shape[0])) if shape else 0
        if "{T}" in (*results, *arguments):
            wide = next((int(part[1:]) for part in form.modifiers & {"v2", "v4"}), 1)
            if max(1, count) != wide:
                raise _Misfit(f"{max(1, count)} values, wanted {wide}")
        values = []
        for argument in arguments:
            if argument in ("n", "d"):
                values.append(str(count) if argument == "n" else self._name(dtype_of(form.other)))
            elif given:
                values.append(self._argument(form, argument.rstrip("?"), given.pop(0)))
            elif argument.endswith("?"):
                values.append("None")
            else:
                raise _Misfit("too few operands")
        if given:
            raise _Misfit("too many operands")
        function = form.line.function
        if isinstance(function, str):
            site = Site(
                form.opcode,
                form.modifiers,
                form.type,
                SIZES.get(form.type, 0),
                count,
                str(instruction),
            )
            call = f"m.{function}({', '.join([self._name(site), mask, *values])})"
        else:
            call = f"{self._name(function)}({', '.join(values)})"
            if form.line.ulps:
                call = f"m.blur({call}, {form.line.ulps})"
        return lines + self._results(form, call, results, targets, mask)

    def _results(
        self, form: Form, call: str, results: list[str], targets: list[Operand], mask: str
    ) -> list[str]:
        if not results:
            return [call]
        kinds, target = results[0].split("|"), targets[0]
        if len(kinds) == 2:
            both = target if isinstance(target, Pair) else Pair(target, Sink())
            first = self._put(form, kinds[0], "t[0]", both.first, mask)
            return [f"t = {call}", first, self._put(form, kinds[1], "t[1]", both.second, mask)]
        if results[0][0] == "{":
            parts = _parts(target)
            if results[0] == "{P}" and not isinstance(target, Vector):
                raise _Misfit("one result, where there should be several")
            kind = self._kind(form, results[0][1:-1], len(parts))
            puts = [self._put(form, kind, f"t[{n}]", part, mask) for n, part in enumerate(parts)]
            return [f"t = {call}", *puts]
        return [self._put(form, self._kind(form, results[0]), call, target, mask)]

    def _put(self, form: Form, kind: str, value: str, target: Operand, mask: str) -> str:
        if isinstance(target, Sink):
            return value
        if not isinstance(target, Register):
            raise _Misfit(f"a {type(target).__name__.lower()} as a result, wanted a register")
        kind = self._kind(form, kind)
        size = SIZES[kind]
        if kind == "f32" and not isinstance(form.line.function, str):
            if "sat" in form.modifiers:
                value = f"saturate({value})"
            if "ftz" in form.modifiers:
                value = f"flush({value})"
        if kind == "bf16":
            value = f"f32_to_bf16({value})"
        elif kind[0] == "s" and target.size > size:
            value = f"{value}.view(I{size}).astype(I{target.size}).view(U{target.size})"
        elif kind[0] in "sf":
            value = f"{value}.view(U{size})"
        if size != target.size:
            if not form.line.wider or target.size < size or not size:
                raise _Misfit(f"a {kind} in the register {target.name} of {target.size} bytes")
            if kind[0] != "s":
                value = f"{value}.astype(U{target.size})"
        if mask != "None":
            value = f"where({mask}, {value}, R[{target.place}])"
        return f"R[{target.place}] = {value}"

    # -- operands

    def _argument(self, form: Form, kind: str, operand: Operand) -> str:
        if kind in ("a32", "a64"):
            return self._address(kind, operand)
        if kind == "param":
            if not isinstance(operand, Address) or not isinstance(operand.base, Symbol):
                raise _Misfit("not the address of a parameter")
            return f"{operand.base.name!r}, {operand.offset}"
        if kind == "places":
            parts = _parts(operand)
            if not all(isinstance(part, Register) and part.size == 4 for part in parts):
                raise _Misfit("not 32-bit registers")
            return str(tuple(part.place for part in parts if isinstance(part, Register)))
        if kind == "box":
            if not isinstance(operand, Address) or len(operand.coordinates or ()) != 2:
                raise _Misfit("not an address and two coordinates")
            coordinates = [self._raw(one, "b32", False) for one in operand.coordinates or ()]
            return ", ".join([self._raw(operand.base, "b64", False), *coordinates])
        if kind == "i":
            if not isinstance(operand, Literal):
                raise _Misfit("not a number that stands in the text")
            return str(int(operand.text.rstrip("U"), 0))
        if kind[0] == "{":
            parts = _parts(operand)
            if kind == "{P}" and not isinstance(operand, Vector):
                raise _Misfit("one operand, where there should be several")
            size = SIZES[self._kind(form, kind[1:-1], len(parts))]
            return (
                f"[{', '.join(self._raw(part, f'b{8 * size}', form.line.wider) for part in parts)}]"
            )
        kind = self._kind(form, kind)
        value = self._value(operand, kind, form.line.wider)
        if kind == "f32" and "ftz" in form.modifiers and not isinstance(form.line.function, str):
            value = f"flush({value})"
        return value

    def _address(self, kind: str, operand: Operand) -> str:
        if not isinstance(operand, Address) or operand.coordinates is not None:
            raise _Misfit("not an address")
        bits = f"u{kind[1:]}"
        value = self._raw(operand.base, bits, False)
        return f"({value} + {self._constant(operand.offset, bits)})" if operand.offset else value

    @staticmethod
    def _kind(form: Form, kind: str, count: int = 1) -> str:
        """The type that a letter stands for."""
        if kind == "T":
            return form.type
        if kind == "D":
            return form.other
        if kind == "W":
            return f"{form.type[0]}{16 * SIZES[form.type]}"
        if kind == "B":
            return f"b{8 * SIZES[form.type]}"
        if kind == "P":
            kind = f"b{8 * SIZES[form.type] // count}"
            if kind not in SIZES or count * SIZES[kind] != SIZES[form.type]:
                raise _Misfit(f"{count} parts of {form.type}")
            return kind
        return kind

    def _value(self, operand: Operand, kind: str, wider: bool) -> str:
        """An expression for an operand as numbers of a type."""
        if isinstance(operand, Literal):
            return self._constant(_bits(operand.text, kind), kind)
        raw = self._raw(operand, kind, wider)
        if kind == "bf16":
            return f"bf16_to_f32({raw})"
        if kind[0] == "f":
            return f"{raw}.view(F{SIZES[kind]})"
        return f"{raw}.view(I{SIZES[kind]})" if kind[0] == "s" else raw

    def _raw(self, operand: Operand, kind: str, wider: bool) -> str:
        """An expression for the bits of an operand, unsigned, or of a predicate."""
        size = SIZES[kind]
        if isinstance(operand, Register):
            if operand.size == size:
                return f"R[{operand.place}]"
            if wider and operand.size > size > 0:
                return f"R[{operand.place}].astype(U{size})"
            raise _Misfit(f"the register {operand.name} of {operand.size} bytes as {kind}")
        if isinstance(operand, Literal):
            return self._constant(_bits(operand.text, kind), kind if not size else f"b{8 * size}")
        if isinstance(operand, Symbol) and size >= 4:
            return self._constant(self.program.symbols[operand.name], f"b{8 * size}")
        if isinstance(operand, Special) and operand.name in SPECIAL and size == 4:
            return f"m.threads.special[{operand.name!r}]"
        raise _Misfit(f"{operand} as {kind}")

    def _constant(self, bits: int, kind: str) -> str:
        masked = bits & ((1 << (8 * SIZES[kind])) - 1) if kind != "pred" else int(bits != 0)
        return f"K[{self._constants.setdefault((masked, kind), len(self._constants))}]"

    def _name(self, thing: object) -> str:
        """A name of something within the functions."""
        name = f"c{len(self._space)}"
        self._space[name] = thing
        return name


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _bits(text: str, kind: str) -> int:
    """A number of the text, as the bits of a type."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        size = 4 if text[1] in "fF" else 8
        if SIZES[kind] != size:
            raise _Misfit(f"the {8 * size} bit number {text} as {kind}")
        return int(text[2:], 16)
    if kind[0] == "f" or kind == "bf16":
        raise _Misfit(f"the integer {text} as {kind}")
    number, bits = int(text.rstrip("U"), 0), 8 * SIZES[kind]
    if bits and not -(1 << (bits - 1)) <= number < 1 << bits:
        raise _Misfit(f"the number {text} as {kind}")
    return number


def _is_together(block: Block) -> bool:
    return any(
        isinstance(form.line.function, str) and form.line.function.startswith(TOGETHER)
        for instruction in block.instructions
        for form in FORMS.get(instruction.opcode, ())
    )
