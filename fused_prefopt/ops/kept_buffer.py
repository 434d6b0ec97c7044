"""The one buffer in which `local` keeps its probabilities from a forward to its backward.

Each thread has one a device, however many graphs are alive: a forward takes it over from the one
before, whose backward then finds its ticket void and recomputes. On CPU the buffer stays for the
next step, because faulting in 250 MiB of new pages can take as long as a whole matmul; elsewhere
the device's allocator sees to that, and the backward gives the buffer back.
"""

from __future__ import annotations

import itertools
import math
import threading

import torch
from torch import Tensor

# (device, thread of the forward) → (ticket, bytes). Backwards may run in threads of autograd's.
_buffers: dict[tuple[torch.device, int], tuple[int, Tensor]] = {}
_tickets = itertools.count(1)


def lease(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """An uninitialised tensor in this thread's buffer, and a (1,) CPU ticket to find it again."""
    nbytes = math.prod(size) * dtype.itemsize
    key = (device, threading.get_ident())
    _, buffer = _buffers.pop(key, (0, None))
    if buffer is None or device.type != "cpu" or buffer.nbytes < nbytes:
        del buffer  # before the next one comes
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
    ticket = next(_tickets)
    _buffers[key] = (ticket, buffer)
    return _view(buffer, size, dtype), torch.tensor([ticket])


def find(ticket: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Tensor that was leased with the ticket, or None if its buffer was taken over or released."""
    wanted = int(ticket)
    for held, buffer in list(_buffers.values()):
        if held == wanted:
            return _view(buffer, size, dtype)
    return None


def give_back(ticket: Tensor) -> None:
    """Free the buffer of a ticket, except on CPU."""
    wanted = int(ticket)
    for key, (held, _) in list(_buffers.items()):
        if held == wanted and key[0].type != "cpu":
            del _buffers[key]


def release_workspace() -> None:
    """Free what the op keeps between steps on CPU: at most `workspace_mb` a thread."""
    _buffers.clear()


def _view(buffer: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return buffer[: math.prod(size) * dtype.itemsize].view(dtype).view(size)
