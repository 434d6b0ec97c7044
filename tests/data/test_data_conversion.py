"""Pairs as points and points as pairs."""

from __future__ import annotations

import pytest

from fused_prefopt.data import pairs_of_points, points_of_pairs


def test_a_pair_becomes_two_rated_points():
    scored = {"prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": 7, "score_rejected": 3}
    plain = {"prompt": "q", "chosen": "d", "rejected": "s"}
    assert points_of_pairs([scored, plain]) == [
        {"prompt": "p", "completion": "c", "reward": 7.0, "group": 0},
        {"prompt": "p", "completion": "r", "reward": 3.0, "group": 0},
        {"prompt": "q", "completion": "d", "reward": 1.0, "group": 1},
        {"prompt": "q", "completion": "s", "reward": 0.0, "group": 1},
    ]


def test_the_best_and_the_worst_point_become_a_pair_and_ties_are_dropped():
    points = [
        {"prompt": "p", "completion": text, "reward": reward, "group": group}
        for text, reward, group in (
            ("a", 2, 5),
            ("b", 9, 5),
            ("x", 4, 6),
            ("c", 1, 5),
            ("y", 4, 6),
        )
    ]
    assert pairs_of_points(points) == [
        {
            "prompt": "p",
            "chosen": "b",
            "rejected": "c",
            "score_chosen": 9.0,
            "score_rejected": 1.0,
        }
    ]


@pytest.mark.parametrize(
    ("convert", "missing"), [(points_of_pairs, "chosen"), (pairs_of_points, "completion")]
)
def test_a_missing_column_is_named(convert, missing):
    with pytest.raises(ValueError, match=missing):
        convert([{"prompt": "p"}])
