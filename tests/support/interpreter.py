"""What the interpreters of older Tritons lack."""

from __future__ import annotations


def mend_older_interpreters() -> None:
    """Let the interpreters of Triton before 3.7 run what its compiler and later ones run."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: type, *scope: object) -> None:
        patch(tensor, *scope)
        # A kernel's scalars are arrays of one element here, and `range` takes them by `int(array)`,
        # which numpy since 2.4 has of arrays without dimensions only. Triton 3.7 squeezes first.
        tensor.__index__ = lambda self: self.handle.data.item()

    def validate(descriptor: interpreter.TensorDescHandle) -> None:
        bytes_each = descriptor.base.dtype.element_ty.primitive_bitwidth // 8
        *outer, inner = (stride.data.item() for stride in descriptor.strides)
        assert len(outer) + 1 == len(descriptor.block_shape) == descriptor.ndim
        assert descriptor.base.data.item() % 16 == 0, "base must be 16-byte aligned"
        # Triton before 3.6 counts elements here, though GPUs want multiples of 16 bytes.
        assert all(stride * bytes_each % 16 == 0 for stride in outer), "strides of 16 bytes"
        assert inner == 1, "last dim must be contiguous"

    interpreter._patch_lang_tensor = patch_and_mend
    interpreter.TensorDescHandle.validate = validate
