"""The code that Triton compiles for a GPU, executed without one.

PTX is parsed, its instructions are executed in numpy, and what a GPU would not forgive is a
`Fault`: accesses out of bounds, misaligned ones, barriers that not all threads reach, reads of what
an asynchronous copy has not brought yet. Races are listed. A new instruction is a line in
`instructions.py`. What ptxas makes of the PTX is not seen here, and the order of memory is no finer
than a barrier.
"""

from .faults import Fault
from .launches import Log, Report, compiled, emulated, launch
from .tensor_cores import CutOff

__all__ = ["CutOff", "Fault", "Log", "Report", "compiled", "emulated", "launch"]
