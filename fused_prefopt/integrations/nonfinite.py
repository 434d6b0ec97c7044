"""Losses and gradients that are not finite, noticed before they reach a weight."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from fused_prefopt.checks import ON_NONFINITE, require_choice
from fused_prefopt.distributed import sum_over_ranks, world_size

_SKIPPED = "skipped_steps"


def mind_nonfinite(trainer: Any, on_nonfinite: str) -> None:
    """Let a trainer stop at, skip or log what is not finite.

    Args:
        trainer: a `MindsNonfinite`; its `args.logging_nan_inf_filter` is switched off, as that
            logs means over other steps in place of a loss that is not finite.
        on_nonfinite: "stop", "skip" or "ignore".

    Raises:
        ValueError: `on_nonfinite` is another word, or "skip" with an optimizer that steps inside
            the backward pass.
    """
    require_choice("on_nonfinite", on_nonfinite, ON_NONFINITE)
    inside = _steps_in_backward(trainer)
    if on_nonfinite == "skip" and inside:
        raise ValueError(
            f"on_nonfinite: got 'skip' with {inside}, whose optimizer steps inside the backward"
            " pass; needs 'stop' or 'ignore'"
        )
    trainer.args.logging_nan_inf_filter = False
    trainer.on_nonfinite = on_nonfinite
    trainer.step_losses = StepLosses(trainer.args.device)
    trainer.remove_callback(_BeforeTheOptimizer)
    trainer.add_callback(_BeforeTheOptimizer(trainer))


class StepLosses:
    """Sums of the micro-batches' losses, kept on their device until it is asked for.

    Args:
        device: of the losses.

    Attributes:
        skipped: optimizer steps left out since the start, in a resumed training since its first
            start, as last logged there.
    """

    def __init__(self, device: torch.device) -> None:
        # Sum of the losses that are not finite, sum of the others, weight of the others, of all.
        self._nothing = torch.zeros(4, dtype=torch.float64, device=device)
        self.skipped = 0
        self.forget()

    def forget(self) -> None:
        """Start anew, but for the count of skipped steps."""
        self._step = self._since_log = self._since_start = self._nothing

    def add(self, loss: Tensor, weight: float) -> Tensor:
        """Count a micro-batch.

        Args:
            loss: 0-d, as a trainer sums it.
            weight: its share of its optimizer step.

        Returns:
            The loss, 0 where it is not finite: a running sum would keep NaN for ever.
        """
        finite = loss.isfinite()
        kept = loss.where(finite, 0.0)
        every = torch.full_like(self._nothing[0], weight)
        row = torch.stack([nonfinite_part(loss), kept, every * finite, every])
        self._step, self._since_log = self._step + row, self._since_log + row
        return kept

    def pop_step(self) -> Tensor:
        """(2,) sums of a step's losses on this rank: those that are not finite, and the others."""
        step, self._step = self._step[:2], self._nothing
        return step

    def logged(self, name: str, value: float, *, skips: bool) -> float:
        """The number to log for a trainer's mean over the steps since the last log or the start.

        Every rank must make the call.

        Args:
            name: "loss", since the last log, or "train_loss".
            value: the trainer's mean, in which losses that are not finite count as 0.
            skips: the mean is over the finite losses alone, NaN without one.
        """
        self._since_start = self._since_start + self._since_log
        found = self._since_log if name == "loss" else self._since_start
        self._since_log = self._nothing
        bad, kept, finite, every = sum_over_ranks(found).tolist()
        if not skips:
            return value + bad
        if finite == every:
            return value
        return kept / finite if finite else math.nan


class MindsNonfinite:
    """Mixin for a `transformers.Trainer` after `mind_nonfinite`.

    Raises:
        FloatingPointError: training meets a loss or gradient that is not finite, with "stop".
    """

    args: Any
    on_nonfinite: str
    step_losses: StepLosses
    # Name of an option by which the optimizer steps inside the backward pass; "" without one.
    steps_in_backward: str = ""
    current_gradient_accumulation_steps: int
    batch_share: float

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's own; a loss that is not finite returns as 0."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        weight = self.batch_share / self.current_gradient_accumulation_steps
        return self.step_losses.add(loss, weight)

    def judge_before_backward(self, model: nn.Module, loss: Tensor) -> None:
        """Stop at a training loss that is not finite where the backward pass is the step."""
        if self.on_nonfinite == "stop" and model.training and _steps_in_backward(self):
            found = sum_over_ranks(nonfinite_part(loss.detach())).item()
            if not math.isfinite(found):
                _stop(self, found)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own, with a mean loss that says what was not finite, and skipped steps."""
        for name in ("loss", "train_loss"):
            if name in logs:
                skips = self.on_nonfinite == "skip"
                logs[name] = self.step_losses.logged(name, logs[name], skips=skips)
                if self.step_losses.skipped:
                    logs[_SKIPPED] = self.step_losses.skipped
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class _BeforeTheOptimizer(TrainerCallback):
    """Judges each step of a trainer when its gradients are whole and no weight has moved."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave behind what an earlier, interrupted training counted."""
        self._trainer.step_losses.forget()
        self._trainer.attachment.forget_metrics("train")
        logged = (row[_SKIPPED] for row in reversed(state.log_history) if _SKIPPED in row)
        self._trainer.step_losses.skipped = next(logged, 0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, or take the step's gradients away, if something in it is not finite."""
        trainer = self._trainer
        losses = trainer.step_losses.pop_step()
        if trainer.on_nonfinite == "ignore" or _steps_in_backward(trainer):
            return
        parameters = [each for group in trainer.optimizer.param_groups for each in group["params"]]
        scaler = trainer.accelerator.scaler
        # In fp16 infinite gradients are how the scaler finds its scale; it skips those itself.
        scaled = scaler is not None and scaler.is_enabled()
        gradient = losses.new_zeros(()) if scaled else _worst_gradient(parameters).to(losses)
        found = sum_over_ranks(torch.cat([losses, gradient[None]]))
        bad, loss, worst = found.tolist()
        if math.isfinite(bad) and math.isfinite(worst):
            return
        if scaled:
            # Its step fails on gradients that it has not looked at.
            with suppress(RuntimeError):
                scaler.unscale_(getattr(trainer.optimizer, "optimizer", trainer.optimizer))
        for each in parameters:
            each.grad = None
        if trainer.on_nonfinite == "stop":
            _stop(trainer, bad if not math.isfinite(bad) else loss / world_size(), worst)
        trainer.step_losses.skipped += 1


def nonfinite_part(value: Tensor) -> Tensor:
    """NaN or the infinity that a 0-d value is, else 0; fp64."""
    value = value.double()
    return value - value.where(value.isfinite(), 0.0)


def _worst_gradient(parameters: list[nn.Parameter]) -> Tensor:
    """`nonfinite_part` of the largest entry of what this rank has of the gradients."""
    gradients = [each.grad for each in parameters if each.grad is not None]
    here = [each.to_local() if hasattr(each, "to_local") else each for each in gradients]
    return nonfinite_part(get_total_norm([each for each in here if each.numel()], math.inf))


def _stop(trainer: Any, loss: float, gradient: float = 0.0) -> None:
    """Log the step that is not taken, and raise."""
    state = trainer.state
    is_loss = not math.isfinite(loss)
    logs = {"loss": loss} if is_loss else {"loss": loss, "grad_norm": gradient}
    state.global_step += 1
    try:
        trainer.log(logs)
    finally:
        state.global_step -= 1
    what = f"loss of {loss}" if is_loss else f"gradient of {gradient} with a loss of {loss:.6g}"
    raise FloatingPointError(
        f"step {state.global_step + 1}: got a {what}, needs finite numbers; the weights are those"
        f" of step {state.global_step}: look at the data and the learning rate, or set"
        " on_nonfinite='skip' or 'ignore'"
    )


def _steps_in_backward(trainer: Any) -> str:
    """Name of what moves the weights inside the backward; "" where `optimizer.step` does."""
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed"
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    own: str = trainer.steps_in_backward
    return f"optim={name!r}" if "lomo" in name or "layerwise" in name else own
