"""The one exception type that means "the user can mend this"."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: the message is one sentence that names the cause and the remedy.

    The command line prints the message on one line of standard error and exits with status 2.
    """
