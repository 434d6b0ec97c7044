"""Options of a fused loss as the configuration of a trainer holds them."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar

from fused_prefopt.preference import PreferenceLoss


@dataclass
class FusedOptions:
    """The options that a fused trainer adds to TRL's.

    Args:
        loss: name of a loss; see `fused_prefopt.available_losses()`.
        loss_kwargs: its hyperparameters.
        beta: the same as `beta` in `loss_kwargs`; None leaves it to them, or to the loss.
        workspace_mb: budget of the op in MiB; None: the device's default (`sequence_logps`).
        engine: of the op; `auto`, `torch`, `cublas` or `triton`.
        log_tokens: also log what TRL logs of single tokens (`entropy`, `logits/chosen`,
            `logits/rejected`, of pairs `mean_token_accuracy`): one more evaluation of the head.
        on_nonfinite: "stop" (with a `FloatingPointError`), "skip" or "ignore" a step whose loss or
            gradient is NaN or infinite; see `integrations.transformers.attach`.
    """

    loss: str = field(default="dpo", metadata={"help": "Name of a loss."})
    # A string of JSON on the command line, as transformers reads its own dictionaries.
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Hyperparameters of the loss."}
    )
    beta: float | None = field(default=None, metadata={"help": "β, if not in `loss_kwargs`."})
    workspace_mb: float | None = field(
        default=None, metadata={"help": "Workspace of the op in MiB; by default the device's."}
    )
    engine: str = field(default="auto", metadata={"help": "Engine of the op."})
    log_tokens: bool = field(
        default=False, metadata={"help": "Log entropy, mean logits and token accuracy."}
    )
    on_nonfinite: str = field(
        default="stop", metadata={"help": "What to do at NaN: `stop`, `skip` or `ignore`."}
    )

    pairwise: ClassVar[bool] = True
    # TRL's options that choose or shape its own loss, and those that are hyperparameters here too.
    _trls_own: ClassVar[tuple[str, ...]] = ()
    _shared: ClassVar[tuple[str, ...]] = ("beta",)

    def build_loss(self) -> PreferenceLoss:
        """The loss that the configuration names.

        Raises:
            ValueError: there is no such loss, it is not of the trainer's kind, an option of TRL's
                own losses is given, or a hyperparameter is given twice.
            TypeError: the loss has no such hyperparameter.
        """
        options: dict[str, Any] = dict(self.loss_kwargs or {})  # type: ignore[arg-type]
        for item in fields(self):
            name, value = item.name, getattr(self, item.name)
            if name not in (*self._trls_own, *self._shared) or value == _default(item):
                continue
            if name in self._trls_own:
                raise ValueError(
                    f"{name}: got {value!r}, an option of TRL's own losses; name a loss in `loss`"
                    " and give its hyperparameters in `loss_kwargs`"
                )
            if options.setdefault(name, value) != value:
                raise ValueError(
                    f"{name}: got {value!r} and {options[name]!r} in loss_kwargs, needs one of them"
                )
        loss_fn = PreferenceLoss(
            self.loss,
            workspace_mb=self.workspace_mb,
            engine=self.engine,
            ld_alpha=getattr(self, "ld_alpha", None),
            **options,
        )
        if loss_fn.loss.pairwise != self.pairwise:
            kind, wanted = ("point-wise", "pairs") if self.pairwise else ("pairwise", "points")
            raise ValueError(f"loss: {self.loss!r} is {kind}, wanted one on {wanted}")
        return loss_fn


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()
