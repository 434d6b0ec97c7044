"""The command line as it is where torch alone is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BARE = """
import sys
for name in ("transformers", "accelerate", "datasets", "tokenizers", "peft", "trl", "matplotlib"):
    sys.modules[name] = None
from fused_prefopt.cli import main
"""


def bare(code: str) -> subprocess.CompletedProcess[str]:
    """Run lines that may call `main` in a fresh interpreter without the optional packages."""
    return subprocess.run(
        [sys.executable, "-c", _BARE + code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
