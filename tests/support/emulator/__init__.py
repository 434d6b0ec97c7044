"""The code that Triton compiles for a GPU, executed without one.

PTX is parsed, its instructions are executed in numpy, and what a GPU would not forgive is a
`Fault`: accesses out of bounds, misaligned ones, barriers that not all threads reach, reads of what
an asynchronous copy has not brought yet. Races are listed. A new instruction is a line in
`instructions.py`. What ptxas makes of the PTX is not seen here, and the order of memory is no finer
than a barrier.
"""

import pytest

# Whoever imports this is skipped where there is no Triton.
pytest.importorskip("triton")

from .cut_off import CutOff  # noqa: E402
from .faults import Fault  # noqa: E402
from .launches import Log, Report, compiled, emulated, launch  # noqa: E402

__all__ = ["CutOff", "Fault", "Log", "Report", "compiled", "emulated", "launch"]
