"""Whether there is a Lightning to build on."""

from importlib import metadata

__all__ = ["check"]

_COMPROMISED = ("2.6.2", "2.6.3")
"""Releases that were published by an attacker."""
_INSTALL = 'pip install "modelbatch[lightning]"'


def check() -> None:
    """Look at the installed Lightning without importing it.

    Raises:
        ImportError: there is none, or one whose code must not be run; the message says what to do.
    """
    try:
        version = metadata.version("lightning")
    except metadata.PackageNotFoundError as error:
        raise ImportError(
            f"modelbatch.integrations.lightning needs lightning, which is not installed: {_INSTALL}"
        ) from error
    if version in _COMPROMISED:
        raise ImportError(
            f"lightning {version} is one of the compromised releases {' and '.join(_COMPROMISED)}, "
            f"so it is not imported; install another one: {_INSTALL}"
        )


check()
