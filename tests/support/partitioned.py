"""Weights that are elsewhere, as DeepSpeed's ZeRO-3 leaves them."""

from __future__ import annotations

import torch
from torch import nn


class Partitioned:
    """ZeRO-3 as a head sees it: weights are empty outside the forward of their own module.

    Hooks gather a module's own parameters before its forward and its backward, and release them
    after the forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.whole: dict[nn.Parameter, torch.Tensor] = {}
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if not own:
                continue
            for parameter in own:
                if parameter not in self.whole:
                    self.whole[parameter] = parameter.data
                    parameter.ds_shape = parameter.shape
                    parameter.data = parameter.new_empty(0)
            module.register_forward_pre_hook(lambda module, _: self.gather(module))
            module.register_forward_hook(lambda module, *_: self.release(module))
            module.register_full_backward_pre_hook(lambda module, _: self.gather(module))

    def gather(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = self.whole[parameter]

    def release(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.new_empty(0)
