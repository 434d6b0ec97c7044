"""Axolotl's trainers on top of TRL's, with the fused loss; what `trainer_cls` names.

Schedulers, optimizers, random states and checkpoints stay Axolotl's: its classes come first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import Any

from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.core.trainers.trl import AxolotlKTOTrainer
from axolotl.core.training_args import AxolotlTrainingMixins
from axolotl.utils.collators.dpo import AxolotlDPODataCollatorWithPadding
from trl import DPOConfig
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt

from fused_prefopt.data.columns import INPUT_IDS, PROMPT
from fused_prefopt.integrations.trl import (
    FusedDPOConfig,
    FusedDPOTrainer,
    FusedKTOConfig,
    FusedKTOTrainer,
)

# The copy that TRL makes of an adapter that a model comes with.
_REFERENCE_ADAPTER = "ref"


@dataclass
class AxolotlFusedDPOConfig(AxolotlTrainingMixins, FusedDPOConfig):
    """`FusedDPOConfig` with Axolotl's options."""


@dataclass
class AxolotlFusedKTOConfig(AxolotlTrainingMixins, FusedKTOConfig):
    """`FusedKTOConfig` with Axolotl's options."""


class AxolotlFusedDPOTrainer(AxolotlDPOTrainer, FusedDPOTrainer):
    """Axolotl's trainer of `rl: dpo`, `ipo`, `simpo` and `orpo` with the fused loss.

    The last two have TRL's CPO and ORPO trainers in Axolotl, which make texts of messages, and put
    the beginning-of-sequence token before a prompt where the tokenizer does not: so does this one,
    for them.

    Args:
        *args, **kwargs: as Axolotl gives them.

    Raises:
        ValueError: the training arguments are not the plugin's, or what `FusedDPOTrainer` raises.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.pop("args")
        config = fused_config(AxolotlFusedDPOConfig, given)
        self._begins = not isinstance(given, DPOConfig)
        collator = kwargs.get("data_collator")
        if isinstance(collator, AxolotlDPODataCollatorWithPadding):
            # It is for another layout of the columns, and does nothing but this.
            config.pad_to_multiple_of = collator.pad_to_multiple_of
            del kwargs["data_collator"]
        adapted = _REFERENCE_ADAPTER in getattr(args[0], "peft_config", {})
        super().__init__(*args, args=config, **kwargs)
        if not self.needs_reference and not adapted:
            model = self.accelerator.unwrap_model(self.model)
            if _REFERENCE_ADAPTER in getattr(model, "peft_config", {}):
                model.delete_adapter(_REFERENCE_ADAPTER)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        if self._begins:
            dataset = dataset.map(partial(_begun, self._tokenizer))
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)


class AxolotlFusedKTOTrainer(AxolotlKTOTrainer, FusedKTOTrainer):
    """Axolotl's trainer of `rl: kto` with the fused loss.

    Args:
        *args, **kwargs: as Axolotl gives them.

    Raises:
        ValueError: the training arguments are not the plugin's, or what `FusedKTOTrainer` raises.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = fused_config(AxolotlFusedKTOConfig, kwargs.pop("args"))
        super().__init__(*args, args=config, **kwargs)


def _begun(tokenizer: Any, row: Mapping[str, Any]) -> dict[str, str]:
    """A row's texts, with the beginning-of-sequence token where tokenising puts none in front."""
    texts = maybe_apply_chat_template(maybe_extract_prompt(dict(row)), tokenizer)
    prompt, bos = texts[PROMPT], tokenizer.bos_token
    if bos is None or tokenizer(prompt)[INPUT_IDS][:1] == [tokenizer.bos_token_id]:
        return texts
    return texts | {PROMPT: bos + prompt}


def fused_config(kind: type[Any], given: Any) -> Any:
    """Axolotl's training arguments of `rl:` as those of a fused trainer.

    Args:
        kind: `AxolotlFusedDPOConfig` or `AxolotlFusedKTOConfig`.
        given: training arguments of the plugin, of any of TRL's trainers; stay as they are.

    Returns:
        A `kind` that has every value of `given`, also those that its constructor made, but for
        the options of TRL's loss, which `fused_prefopt` holds.

    Raises:
        ValueError: the plugin has not made `given`.
    """
    options = getattr(given, "fused_prefopt", None)
    if options is None:
        raise ValueError(
            "trainer_cls: got one of fused_prefopt without its plugin, needs plugins:"
            " [fused_prefopt.integrations.axolotl.FusedPlugin]"
        )
    known = {item.name for item in fields(kind)}
    # Those of another loss, of a configuration that TRL's trainer here does not have.
    left_out = {item.name for item in fields(given)} - known | {*kind._trls_own, *kind._shared}
    config = object.__new__(kind)
    # Not by its constructor, which would do again what that of `given` has done to the values.
    for item in fields(kind):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        setattr(config, item.name, default)
    for name, value in vars(given).items():
        if name not in left_out:
            setattr(config, name, value)
    for name, value in options.items():
        setattr(config, name, value)
    return config
