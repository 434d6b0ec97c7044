"""All adapters by name, and data sets loaded and adapted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from typing import Any

from fused_prefopt.checks import require_choice
from fused_prefopt.data.completion_adapters import completions, ultrafeedback
from fused_prefopt.data.pair_adapters import hh_rlhf, preference, ultrafeedback_binarized
from fused_prefopt.data.recognition import recognise

Row = Mapping[str, Any]
Record = dict[str, Any]
logger = logging.getLogger(__name__)
Adapter = Callable[[Iterable[Row]], list[Record]]
READERS: dict[str, Adapter] = {
    adapter.__name__: adapter
    for adapter in (preference, hh_rlhf, ultrafeedback_binarized, completions, ultrafeedback)
}
# Data sets of the hub whose adapter is known without a look at their columns.
ADAPTERS: dict[str, Adapter] = {
    "Anthropic/hh-rlhf": hh_rlhf,
    "HuggingFaceH4/ultrafeedback_binarized": ultrafeedback_binarized,
    "openbmb/UltraFeedback": ultrafeedback,
}


def adapted_records(
    name: str, rows: Iterable[Row], adapter: str | None = None
) -> tuple[list[Record], str]:
    """Records of a data set's rows, and what the rows were read as, in a sentence.

    Args:
        name: of the data set.
        rows: of one kind.
        adapter: name in `READERS`; None takes the one of the name in `ADAPTERS`, else the one that
            fits the first row's columns.

    Raises:
        ValueError: there is no such adapter, none or several fit the columns, or a row does not
            fit the adapter.
    """
    if adapter is not None:
        require_choice("adapter", adapter, READERS)
        return READERS[adapter](rows), f"{name}: read by adapter {adapter}"
    if name in ADAPTERS:
        known = ADAPTERS[name]
        return known(rows), f"{name}: read by adapter {known.__name__}, known by the name"
    rows = iter(rows)
    first = list(islice(rows, 1))
    if not first:
        return [], f"{name}: no rows"
    fit = recognise(first[0])
    said = f"{name}: read as {fit.what} (adapter {fit.adapter})"
    return READERS[fit.adapter](chain(first, rows)), said


def load_dataset_records(
    name: str, split: str, limit: int | None = None, adapter: str | None = None
) -> list[Record]:
    """Load a dataset with `datasets.load_dataset` and adapt its rows.

    A log message says what they were read as.

    Args:
        name: on the Hugging Face hub, or a local folder.
        split: such as "train_prefs"; the dataset defines which there are.
        limit: rows to read; they are streamed instead of downloading the dataset. None reads all.
        adapter: one of `READERS`; None takes that of the names in `ADAPTERS`, and of any other
            dataset the one that fits the columns of its first row.

    Returns:
        Records of pairs (`prompt`, `chosen`, `rejected`) or of single completions (`prompt`,
        `completion`), as the adapter makes them.

    Raises:
        ValueError: there is no such adapter, none or several fit the columns, or a row lacks a
            column that the adapter needs or has a value that it cannot use.
    """
    from datasets import load_dataset

    rows = load_dataset(name, split=split, streaming=limit is not None)
    records, said = adapted_records(name, islice(rows, limit), adapter)
    logger.info("%s", said)
    return records
