"""PTX text as a program: blocks of instructions whose operands are resolved to registers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

# A thread waits here for others: each stands in a block of its own, where a warp can be halted.
BARRIERS = ("bar.sync", "barrier.sync", "barrier.cta.sync")


@dataclass(frozen=True)
class Register:
    """A place in the register file; `size` in bytes, 0 for a predicate."""

    name: str
    place: int
    size: int


@dataclass(frozen=True)
class Special:
    """A register that the hardware fills, `%tid.x`."""

    name: str


@dataclass(frozen=True)
class Literal:
    """A number as it is written; what it means depends on the type it is read as."""

    text: str


@dataclass(frozen=True)
class Symbol:
    """The address of a parameter, or of the shared memory that the launch sizes."""

    name: str


@dataclass(frozen=True)
class Sink:
    """`_`: a result that nobody wants."""


@dataclass(frozen=True)
class Pair:
    """`%r1|%p1`: two results."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Vector:
    """`{%r1, %r2}`."""

    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """`[%rd1+16]`, or `[%rd1, {%r1, %r2}]` with coordinates in a tensor."""

    base: Operand
    offset: int = 0
    coordinates: tuple[Operand, ...] | None = None


Operand = Register | Special | Literal | Symbol | Sink | Pair | Vector | Address


@dataclass(frozen=True)
class Guard:
    """`@%p1` or `@!%p1`."""

    register: Register
    negated: bool


@dataclass(frozen=True)
class Instruction:
    """One instruction, and where it comes from.

    Attributes:
        opcode: with its modifiers, `add.rn.f32`.
        operands: the result first.
        guard: the predicate it is under.
        text: as it is written.
        where: file:line:column of the source.
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: Guard | None
    text: str
    where: str

    def __str__(self) -> str:
        return f"{self.text}  [{self.where}]"


@dataclass
class Branch:
    """How a block ends other than by falling into the next.

    Attributes:
        target: number of a block; that after the last one where threads end.
        guard: the predicate it is under.
        uniform: the program promises that the threads of a warp agree.
        text: as it is written, and where it comes from.
    """

    target: int
    guard: Guard | None
    uniform: bool
    text: str


@dataclass
class Block:
    """Instructions that are entered at the first and left after the last."""

    instructions: list[Instruction] = field(default_factory=list)
    branch: Branch | None = None
    waits: bool = False  # holds a barrier, and nothing else


@dataclass(frozen=True)
class Parameter:
    """Of the entry; `size` in bytes."""

    name: str
    size: int
    offset: int


@dataclass
class Program:
    """A kernel.

    Attributes:
        name: of the entry.
        parameters: in order.
        registers: of every scope, by place.
        blocks: in the order of the text.
        threads: of a program as the text requires them, None where it does not.
        symbols: names whose address can be taken; in their own address space.
    """

    name: str
    parameters: list[Parameter]
    registers: list[Register]
    blocks: list[Block]
    threads: int | None
    symbols: dict[str, int]


_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z]+(\d+)\s+(?:\.ptr\b.*\s)?([\w$]+)(?:\[(\d+)\])?\s*$"
)
_LABEL = re.compile(r"([$%\w]+):(?!:)")
_SPECIAL = re.compile(r"%[a-z][\w]*(\.[xyz])?$")
_NUMBER = re.compile(r"(-?(0[xX][0-9a-fA-F]+|\d+)U?|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16})$")
_SYMBOL = re.compile(r"[A-Za-z_$][\w$]*$")


def parse(text: str) -> Program:
    """Read the entry of a module.

    Raises:
        NotImplementedError: a statement or an operand of a form that is not known, or several
            entries.
        ValueError: the text holds no entry, or a branch to a label that does not exist.
    """
    head, found, rest = text.partition(".visible .entry ")
    if not found:
        raise ValueError("PTX: got a module without `.visible .entry`")
    entries = 1 + len(re.findall(r"^\s*(?:\.visible\s+)?\.entry\s", rest, re.MULTILINE))
    if entries > 1:
        raise NotImplementedError(f"PTX: got a module of {entries} entries, wanted one")
    name = re.match(r"[\w$]+", rest)
    assert name is not None
    declared, _, rest = rest.partition("(")[2].partition("\n)")
    heading, _, body = rest.partition("{")
    threads = re.search(r"\.reqntid\s+([\d, ]+)", heading)
    parameters = _parameters(declared)
    symbols = {parameter.name: parameter.offset for parameter in parameters}
    symbols |= {shared: 0 for shared in re.findall(r"\.extern\s+\.shared\b.*?([\w$]+)\[\]", head)}
    reader = _Reader(symbols)
    reader.read(body)
    return Program(
        name[0],
        parameters,
        reader.registers,
        reader.blocks,
        math.prod(map(int, threads[1].split(","))) if threads else None,
        symbols,
    )


def _parameters(declared: str) -> list[Parameter]:
    found, offset = [], 0
    for raw in declared.split(","):
        one = raw.strip()
        if not one:
            continue
        match = _PARAMETER.match(one)
        if match is None:
            raise NotImplementedError(f"parameter: {one}")
        size = int(match[2]) // 8 * int(match[4] or 1)
        align = int(match[1] or size)
        offset = -(-offset // align) * align
        found.append(Parameter(match[3], size, offset))
        offset += size
    return found


class _Reader:
    """The body of an entry, statement by statement; names belong to the scope they stand in."""

    def __init__(self, symbols: dict[str, int]) -> None:
        self.registers: list[Register] = []
        self.blocks: list[Block] = [Block()]
        self._symbols = symbols
        self._scopes: list[dict[str, Register]] = [{}]
        self._labels: list[dict[str, int]] = [{}]
        self._branches: list[tuple[Branch, str, tuple[dict[str, int], ...]]] = []
        self._where = "unknown source"

    def read(self, body: str) -> None:
        buffer = ""
        for raw in body.splitlines():
            line, _, comment = raw.partition("//")
            line = line.strip()
            if line.split(None, 1)[:1] == [".loc"]:
                # Older Tritons add where a function was called: a.py:1:2 @[ b.py:3:4 ].
                self._where = comment.partition(" @[")[0].strip() or line
                continue
            buffer = f"{buffer} {line}".strip()
            while buffer:
                label = _LABEL.match(buffer)
                if label:
                    self._label(label[1])
                    buffer = buffer[label.end() :]
                elif buffer[0] == "{":
                    self._scopes.append({})
                    self._labels.append({})
                    buffer = buffer[1:]
                elif buffer[0] == "}":
                    self._scopes.pop()
                    self._labels.pop()
                    if not self._scopes:
                        self._finish()
                        return
                    buffer = buffer[1:]
                elif ";" in buffer:
                    statement, _, buffer = buffer.partition(";")
                    self._statement(statement.strip())
                else:
                    break
                buffer = buffer.strip()
        raise ValueError("PTX: got an entry without its closing brace")

    def _finish(self) -> None:
        end = len(self.blocks)
        for branch, label, scopes in self._branches:
            places = [scope[label] for scope in reversed(scopes) if label in scope]
            if label and not places:
                raise ValueError(f"PTX: got a branch to {label}, which is not there: {branch.text}")
            branch.target = places[0] if label else end

    def _label(self, name: str) -> None:
        # Labels of debug information stand in the middle of blocks, and nothing jumps to them.
        if name.startswith(("$L__tmp", "$L__func")):
            return
        if self.blocks[-1].instructions or self.blocks[-1].branch or self.blocks[-1].waits:
            self.blocks.append(Block())
        self._labels[-1][name] = len(self.blocks) - 1

    def _statement(self, statement: str) -> None:
        if not statement:
            return
        if statement.startswith("."):
            if statement.startswith(".reg"):
                self._declare(statement)
            elif not statement.startswith(".pragma"):
                raise NotImplementedError(f"{statement}  [{self._where}]")
            return
        guard, rest = None, statement
        if rest.startswith("@"):
            mark, rest = rest.split(None, 1)
            register = self._register(mark.lstrip("@!"))
            if register is None or register.size:
                raise NotImplementedError(
                    f"{statement}  [{self._where}]: {mark} is no predicate that is declared"
                )
            guard = Guard(register, mark.startswith("@!"))
        opcode, *more = rest.split(None, 1)
        text = " ".join(statement.split())
        operands = more[0] if more else ""
        if opcode in ("bra", "bra.uni", "ret", "exit"):
            label = operands.strip() if opcode.startswith("bra") else ""
            branch = Branch(-1, guard, opcode == "bra.uni", f"{text}  [{self._where}]")
            self.blocks[-1].branch = branch
            self._branches.append((branch, label, tuple(self._labels)))
            self.blocks.append(Block())
            return
        try:
            parts = tuple(self._operand(part) for part in _split(operands))
        except NotImplementedError as error:
            raise NotImplementedError(f"{text}  [{self._where}]: {error}") from None
        instruction = Instruction(opcode, parts, guard, text, self._where)
        if opcode in BARRIERS:
            if self.blocks[-1].instructions:
                self.blocks.append(Block())
            self.blocks[-1].instructions.append(instruction)
            self.blocks[-1].waits = True
            self.blocks.append(Block())
        else:
            self.blocks[-1].instructions.append(instruction)

    def _declare(self, statement: str) -> None:
        match = re.match(r"\.reg\s+\.(pred|[busf](?:8|16|32|64))\s+(.*)", statement)
        if match is None:
            raise NotImplementedError(f"{statement}  [{self._where}]")
        size = 0 if match[1] == "pred" else int(match[1][1:]) // 8
        for item in match[2].split(","):
            many = re.fullmatch(r"(\S+)<(\d+)>", item.strip())
            names = [f"{many[1]}{n}" for n in range(int(many[2]))] if many else [item.strip()]
            for name in names:
                self._scopes[-1][name] = Register(name, len(self.registers), size)
                self.registers.append(self._scopes[-1][name])

    def _register(self, name: str) -> Register | None:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        return None

    def _operand(self, text: str) -> Operand:
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].strip())
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first.strip()), self._operand(second.strip()))
        register = self._register(text)
        if register is not None:
            return register
        if _SPECIAL.match(text):
            return Special(text)
        if _NUMBER.match(text):
            return Literal(text)
        if _SYMBOL.match(text) and text in self._symbols:
            return Symbol(text)
        raise NotImplementedError(f"operand {text!r}")

    def _address(self, text: str) -> Address:
        place, *coordinates = _split(text)
        base, _, offset = place.partition("+")
        inner = coordinates[0] if coordinates else None
        if len(coordinates) > 1 or (inner is not None and not inner.startswith("{")):
            raise NotImplementedError(f"address [{text}]")
        vector = self._operand(inner) if inner is not None else None
        return Address(
            self._operand(base.strip()),
            int(offset.strip() or "0", 0),
            vector.parts if isinstance(vector, Vector) else None,
        )


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return [*parts, current.strip()] if current.strip() else parts
