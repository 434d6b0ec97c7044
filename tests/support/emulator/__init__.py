"""The code that Triton compiles for a GPU, executed without one.

PTX is parsed, its instructions are executed in numpy, and what a GPU would not forgive is a
`Fault`: accesses out of bounds, misaligned ones, barriers that not all threads reach, reads of what
an asynchronous copy has not brought yet. Races are listed. What ptxas makes of the PTX is not seen
here, and the order of memory is no finer than a barrier.

How an instruction travels: `launches` compiles what a launcher launches; `ptx` parses the text into
blocks; `translation` looks each instruction up in the table of `instructions` and writes its block
as a Python function; `machine` runs the blocks for threads that stand at them. A pure instruction
calls a function of `arithmetic`. One with effects calls a part of the machine: `memory`, `copies`
(cp.async), `warps`, `tensor_cores` (mma), and on sm_90 `mbarriers` (with bulk copies) and
`warpgroups` (wgmma), for which `async_proxy` keeps the state of shared memory. A new instruction is
a line in `instructions`, and its function where none does what it needs.
"""

import pytest

# Whoever imports this is skipped where there is no Triton.
pytest.importorskip("triton")

from .cut_off import CutOff  # noqa: E402
from .faults import Fault  # noqa: E402
from .launches import Log, Report, compiled, emulated, launch  # noqa: E402

__all__ = ["CutOff", "Fault", "Log", "Report", "compiled", "emulated", "launch"]
