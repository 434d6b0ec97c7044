"""References that DeepSpeed's ZeRO-3 partitions when they are loaded, as it does the policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import nn

# What an engine that trains nothing has no use for.
_OF_TRAINING = ("optimizer", "scheduler")


def runnable(model: nn.Module, accelerator: Any) -> nn.Module:
    """A reference that runs: itself, or DeepSpeed's engine around it, which gathers its weights.

    Args:
        model: a model whose weights ZeRO-3 may have partitioned, or an engine around one.
        accelerator: of the trainer, whose DeepSpeed config counts.
    """
    plugin = accelerator.state.deepspeed_plugin
    partitioned = any(hasattr(value, "ds_id") for value in model.parameters())
    # An engine has the model in it.
    if plugin is None or not partitioned or hasattr(model, "zero_optimization"):
        return model
    import deepspeed

    config = _decided(deepcopy(plugin.deepspeed_config))
    config = {name: value for name, value in config.items() if name not in _OF_TRAINING}
    config["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


@contextmanager
def running(model: nn.Module, accelerator: Any) -> Iterator[nn.Module]:
    """`runnable`, for a while: an engine that was made goes, for one that trains the model.

    Args:
        model, accelerator: as in `runnable`.
    """
    found = runnable(model, accelerator)
    training = model.training
    try:
        yield found
    finally:
        if found is not model:
            found.destroy()  # type: ignore[operator]
            model.train(training)


def _decided(config: Any) -> Any:
    """A config without what a trainer has yet to decide ("auto"), for which defaults do."""
    if not isinstance(config, Mapping):
        return config
    return {name: _decided(value) for name, value in config.items() if value != "auto"}
