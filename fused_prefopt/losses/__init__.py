"""Losses: pure functions of per-sequence log-probs, composed from rewards, margins and links."""

from fused_prefopt.losses import baselines, presets
from fused_prefopt.losses.gaps import gap_of
from fused_prefopt.losses.links import (
    Hinge,
    Logistic,
    Robust,
    Squared,
    UnbiasedRobust,
    Weighted,
    hinge,
    logistic,
    robust,
    squared,
    unbiased_robust,
)
from fused_prefopt.losses.margins import (
    AdaptiveMargin,
    ConstantMargin,
    DynamicMargin,
    Normalisation,
)
from fused_prefopt.losses.needs import check_needs
from fused_prefopt.losses.offsets import LengthMargin, OffsetMargin, ScoreMargin, SequenceKlMargin
from fused_prefopt.losses.pairwise import PairwiseLoss
from fused_prefopt.losses.pointwise import BinaryFeedbackLoss, DirectRewardLoss
from fused_prefopt.losses.registry import LossInfo, available_losses, find, register
from fused_prefopt.losses.regularisers import Calibration, ChosenNll
from fused_prefopt.losses.rewards import LogOdds, LogRatio, MeanLogp, MeanLogRatio, SumLogp
from fused_prefopt.losses.solver import exact_margins, mirror_margins

__all__ = [
    "Weighted",
    "SequenceKlMargin",
    "ScoreMargin",
    "OffsetMargin",
    "MeanLogRatio",
    "LogOdds",
    "LengthMargin",
    "ChosenNll",
    "Calibration",
    "BinaryFeedbackLoss",
    "AdaptiveMargin",
    "ConstantMargin",
    "DirectRewardLoss",
    "DynamicMargin",
    "Hinge",
    "LogRatio",
    "Logistic",
    "LossInfo",
    "MeanLogp",
    "Normalisation",
    "PairwiseLoss",
    "Robust",
    "Squared",
    "SumLogp",
    "UnbiasedRobust",
    "available_losses",
    "baselines",
    "check_needs",
    "exact_margins",
    "find",
    "gap_of",
    "hinge",
    "logistic",
    "mirror_margins",
    "presets",
    "register",
    "robust",
    "squared",
    "unbiased_robust",
]
