"""The only state of the package: what a loss remembers of earlier batches."""

from fused_prefopt.statistics.base import Statistic
from fused_prefopt.statistics.joint import JointStatistic
from fused_prefopt.statistics.level import ReferenceLevel, RewardLevel, RunningLevel
from fused_prefopt.statistics.margin_queue import MarginPool, MarginQueue
from fused_prefopt.statistics.moments import (
    BatchMoments,
    DatasetMoments,
    Moments,
    ReferenceMoments,
    RunningMoments,
)

__all__ = [
    "BatchMoments",
    "DatasetMoments",
    "JointStatistic",
    "MarginPool",
    "MarginQueue",
    "Moments",
    "ReferenceLevel",
    "ReferenceMoments",
    "RewardLevel",
    "RunningLevel",
    "RunningMoments",
    "Statistic",
]
