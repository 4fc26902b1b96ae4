"""The one exception that a user causes and can mend."""


class UserError(Exception):
    """Bad input: one line that names the setting, its value, what is allowed and what to do.

    Entry points print it as ``error: ...`` and exit with status 2, without a traceback.
    """


class AgreedError(UserError):
    """One that every rank raises alike, after they agreed on it: rank 0 alone prints it."""
