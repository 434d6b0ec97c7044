"""What a user can put right: told in a sentence, without a stack trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fused_prefopt import extras


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
    except BrokenPipeError:  # an OSError, of whoever reads the output
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        said = str(error)
        raise UserError(said if said.startswith(f"{what}:") else f"{what}: {said}") from error


def require_packages(who: str, *packages: str) -> None:
    """Raise UserError, saying what to install, unless all the packages are there.

    Args:
        who: what needs them, for the message.
        *packages: names to import.
    """
    try:
        extras.require_packages(who, *packages)
    except ImportError as error:
        raise UserError(str(error)) from error
