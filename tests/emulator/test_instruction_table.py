"""The table of instructions: each line is tested, and holds what compiled kernels take."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")
import test_conversions  # noqa: E402
import test_float_instructions  # noqa: E402
import test_integer_instructions  # noqa: E402
import test_memory_instructions  # noqa: E402
import test_warp_instructions  # noqa: E402
from emulator import compiled  # noqa: E402
from emulator.instructions import FORMS, LINES, spell  # noqa: E402
from machines import EVERYTHING  # noqa: E402

from benchmarks.kernel_cases import CASES, DTYPES, TARGETS, Setting  # noqa: E402
from benchmarks.kernel_gate import recording  # noqa: E402

_ELEMENTWISE = (
    *test_integer_instructions.CASES,
    *test_float_instructions.CASES,
    *test_float_instructions.APPROXIMATIONS,
    *test_conversions.CASES,
)
TESTED = {opcode for case in _ELEMENTWISE for opcode in case.opcodes}
TESTED |= test_memory_instructions.OPCODES | test_warp_instructions.OPCODES
# What only sm_90 has is tested in a file of its own.
HOPPER = re.compile(r"cvta\.param|mbarrier|bulk|wgmma|stmatrix|elect|fence|setmaxnreg|prefetch")


def test_every_line_is_tested():
    assert (
        sorted(opcode for opcode in FORMS if opcode not in TESTED and not HOPPER.search(opcode))
        == []
    )


def test_no_opcode_is_spelled_twice_for_the_same_operands():
    seen = [(opcode, line.types) for line in LINES for opcode in spell(line.pattern)]
    assert len(seen) == len(set(seen))


# Without EMULATE=all those that hold all that the others do, and compile soon.
SOME = (
    "fold logits",
    "fold rows, kept",
    "sequence sums",
    "pair loss, dynamic",
    "direct reward, groups",
)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"] if EVERYTHING else ["sm_80"])
@pytest.mark.parametrize(
    "name", [n for n, case in CASES.items() if case.default] if EVERYTHING else SOME
)
def test_compiled_kernels_take_nothing_else(name, target):
    """In the default configurations."""
    missing = set()
    for dtype in CASES[name].dtypes if EVERYTHING else CASES[name].dtypes[:1]:
        with recording(TARGETS[target].gpu) as launches:
            CASES[name].launch(Setting(TARGETS[target].architecture, DTYPES[dtype]))
        for launch in launches:
            missing |= {
                opcode for opcode in opcodes(compiled(launch, target)[0]) if opcode not in FORMS
            }
    assert sorted(missing) == []


def opcodes(text: str) -> set[str]:
    """Of a program, without its branches and labels."""
    body = text.partition("$L__func_begin0")[2].partition("$L__func_end0")[0]
    found = re.findall(r"^\s*\{?\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)[\s;]", body, re.MULTILINE)
    return {each for each in found if each[-1] != ":"} - {"bra", "bra.uni", "ret"}
