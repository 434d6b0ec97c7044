"""A plugin of pytest that puts our trainers and configurations on TRL in the place of TRL's own."""

from __future__ import annotations

import trl

from fused_prefopt.integrations import trl as ours


def pytest_configure() -> None:
    for name in ("DPOConfig", "DPOTrainer", "KTOConfig", "KTOTrainer"):
        setattr(trl, name, getattr(ours, f"Fused{name}"))
