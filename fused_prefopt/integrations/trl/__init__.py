"""TRL, from 1.9: its trainers on pairs and on single completions, with any loss of this package."""

from __future__ import annotations

from fused_prefopt.checks import require_packages, require_version

require_version("trl")
try:
    from fused_prefopt.integrations.trl.dpo import FusedDPOConfig, FusedDPOTrainer
    from fused_prefopt.integrations.trl.kto import FusedKTOConfig, FusedKTOTrainer
except (ImportError, RuntimeError):  # of a lazy module, which tells less than what follows
    require_packages(__name__, "trl", "transformers", "accelerate", "datasets")
    raise

__all__ = ["FusedDPOConfig", "FusedDPOTrainer", "FusedKTOConfig", "FusedKTOTrainer"]
