"""The exceptions that mean "the user can mend this"."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: the message is one sentence that names the cause and the remedy.

    The command line prints the message on one line of standard error and exits with status 2.
    """


class NotFiniteError(UserError):
    """Numbers became NaN or infinite, in training or in a picture."""
