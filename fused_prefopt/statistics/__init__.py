"""The only state of the package: what a loss remembers of earlier batches."""

from fused_prefopt.statistics.base import JointStatistic, Statistic
from fused_prefopt.statistics.margin_queue import MarginPool, MarginQueue
from fused_prefopt.statistics.moments import (
    BatchMoments,
    DatasetMoments,
    MarginMeans,
    Moments,
    ReferenceMean,
    ReferenceMoments,
    RunningMean,
    RunningMoments,
)
from fused_prefopt.statistics.of_terms import TermStatistics
from fused_prefopt.statistics.reward_shift import (
    BalancedShift,
    BatchwiseShift,
    PooledShift,
    RewardLevel,
    ShiftStatistic,
)
from fused_prefopt.statistics.stepped_penalty import Penalty, SteppedPenalty

__all__ = [
    "BalancedShift",
    "BatchMoments",
    "BatchwiseShift",
    "DatasetMoments",
    "JointStatistic",
    "MarginMeans",
    "MarginPool",
    "MarginQueue",
    "Moments",
    "Penalty",
    "PooledShift",
    "ReferenceMean",
    "ReferenceMoments",
    "RewardLevel",
    "RunningMean",
    "RunningMoments",
    "ShiftStatistic",
    "Statistic",
    "SteppedPenalty",
    "TermStatistics",
]
