"""Losses: pure functions of per-sequence log-probs, composed from rewards, margins and links."""

from fused_prefopt.losses import baselines, presets, trl_presets, variants
from fused_prefopt.losses.anchored import AnchoredLoss
from fused_prefopt.losses.bradley_terry import bradley_terry_loss
from fused_prefopt.losses.curved_rewards import (
    AlphaRatio,
    ForwardKlRatio,
    JensenShannonRatio,
    MeanPower,
)
from fused_prefopt.losses.feedback import AnchoredFeedbackLoss, BinaryFeedbackLoss
from fused_prefopt.losses.further_links import Blended, Exact, Indifferent
from fused_prefopt.losses.gaps import gap_of
from fused_prefopt.losses.length_desensitized import length_desensitized, tail_labels
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
from fused_prefopt.losses.offsets import (
    DropMargin,
    LengthMargin,
    OffsetMargin,
    ScoreMargin,
    SequenceKlMargin,
)
from fused_prefopt.losses.pairwise import PairwiseLoss
from fused_prefopt.losses.pointwise import DirectRewardLoss
from fused_prefopt.losses.published import PublishedSetting, preset, published_settings
from fused_prefopt.losses.reductions import SoftMinimum
from fused_prefopt.losses.registry import LossInfo, available_losses, find, register
from fused_prefopt.losses.regularisers import Calibration, ChosenNll
from fused_prefopt.losses.rewards import (
    LogOdds,
    LogRatio,
    MeanLogp,
    MeanLogRatio,
    RejectedShare,
    SumLogp,
)
from fused_prefopt.losses.scaling import DynamicScale
from fused_prefopt.losses.solver import exact_margins, mirror_margins
from fused_prefopt.losses.transport import TransportLoss
from fused_prefopt.losses.weighting import OnPolicyWeights

__all__ = [
    "AdaptiveMargin",
    "AlphaRatio",
    "AnchoredFeedbackLoss",
    "AnchoredLoss",
    "BinaryFeedbackLoss",
    "Blended",
    "Calibration",
    "ChosenNll",
    "ConstantMargin",
    "DirectRewardLoss",
    "DropMargin",
    "DynamicMargin",
    "DynamicScale",
    "Exact",
    "ForwardKlRatio",
    "Hinge",
    "Indifferent",
    "JensenShannonRatio",
    "LengthMargin",
    "LogOdds",
    "LogRatio",
    "Logistic",
    "LossInfo",
    "MeanLogRatio",
    "MeanLogp",
    "MeanPower",
    "Normalisation",
    "OffsetMargin",
    "OnPolicyWeights",
    "PairwiseLoss",
    "PublishedSetting",
    "RejectedShare",
    "Robust",
    "ScoreMargin",
    "SequenceKlMargin",
    "SoftMinimum",
    "Squared",
    "SumLogp",
    "TransportLoss",
    "UnbiasedRobust",
    "Weighted",
    "available_losses",
    "baselines",
    "bradley_terry_loss",
    "check_needs",
    "exact_margins",
    "find",
    "gap_of",
    "hinge",
    "length_desensitized",
    "logistic",
    "mirror_margins",
    "preset",
    "presets",
    "published_settings",
    "register",
    "robust",
    "squared",
    "tail_labels",
    "trl_presets",
    "unbiased_robust",
    "variants",
]
