"""The error that a user can mend."""


class InputError(ValueError):
    """What was given cannot be used; says what it is and what to do about it. A command ends with it in one line.

    Other ValueErrors are bugs: they end a command with their traceback, where they do not cost one adapter alone.
    """
