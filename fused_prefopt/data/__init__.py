"""Preference data: an embedded corpus, records to token ids, collators, adapters for datasets."""

from fused_prefopt.data.adapters import (
    completions,
    hh_rlhf,
    lists,
    preference,
    ultrafeedback,
    ultrafeedback_binarized,
)
from fused_prefopt.data.collators import (
    GroupBatchSampler,
    ListCollator,
    PairCollator,
    PointCollator,
)
from fused_prefopt.data.corpus import Document, load_documents, paragraphs, split_documents
from fused_prefopt.data.corrupted import make_pairs, make_points
from fused_prefopt.data.labels import labels_of, prompt_labels_of
from fused_prefopt.data.list_rows import lists_of_points, points_of_lists
from fused_prefopt.data.records import load_dataset_records, pairs_of_points, points_of_pairs
from fused_prefopt.data.sequence_shards import shard_of, token_places
from fused_prefopt.data.tokenise import (
    tokenise_lists,
    tokenise_pairs,
    tokenise_points,
    train_tokenizer,
)

__all__ = [
    "Document",
    "GroupBatchSampler",
    "ListCollator",
    "PairCollator",
    "PointCollator",
    "completions",
    "hh_rlhf",
    "labels_of",
    "lists",
    "lists_of_points",
    "load_dataset_records",
    "load_documents",
    "make_pairs",
    "make_points",
    "pairs_of_points",
    "paragraphs",
    "points_of_lists",
    "points_of_pairs",
    "preference",
    "prompt_labels_of",
    "shard_of",
    "split_documents",
    "token_places",
    "tokenise_lists",
    "tokenise_pairs",
    "tokenise_points",
    "train_tokenizer",
    "ultrafeedback",
    "ultrafeedback_binarized",
]
