"""Which optional packages are missing, and what installs them."""

from __future__ import annotations

from importlib.util import find_spec

# Package → what installs it.
_INSTALLS = {
    "transformers": 'pip install "fused-prefopt[trainers]"',
    "accelerate": 'pip install "fused-prefopt[trainers]"',
    "datasets": 'pip install "fused-prefopt[trainers]"',
    "tokenizers": 'pip install "fused-prefopt[trainers]"',
    "yaml": 'pip install "fused-prefopt[trainers]"',
    "matplotlib": 'pip install "fused-prefopt[plots]"',
    "peft": 'pip install "peft>=0.17"',
    "trl": 'pip install "fused-prefopt[trainers]" "trl>=1.15"',
}


def require_packages(who: str, *packages: str) -> None:
    """Raise ImportError, saying what to install, unless all the packages are there.

    Args:
        who: what needs them, for the message.
        *packages: names to import.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        commands = " and ".join(dict.fromkeys(_INSTALLS[name] for name in missing))
        raise ImportError(f"{who} needs {', '.join(missing)}: {commands}")
