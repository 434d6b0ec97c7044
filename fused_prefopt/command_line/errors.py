"""What a user can put right: told in a sentence, without a stack trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
}


class UserError(Exception):
    """A command cannot do what it was asked to; the message says what it needs."""


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Turn the errors of bad input inside the block into a `UserError`.

    Args:
        what: the key, option or file that is to blame if anything is; begins the message.

    Raises:
        UserError: instead of ValueError, TypeError, OSError or ImportError.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        said = str(error)
        raise UserError(said if said.startswith(f"{what}:") else f"{what}: {said}") from error


def require_packages(who: str, *packages: str) -> None:
    """Raise UserError, saying what to install, unless all the packages are there.

    Args:
        who: what needs them, for the message.
        *packages: names to import.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        commands = " and ".join(dict.fromkeys(_INSTALLS[name] for name in missing))
        raise UserError(f"{who} needs {', '.join(missing)}: {commands}")
