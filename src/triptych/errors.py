"""The one exception a user's mistake raises."""


class UserError(ValueError):
    """A user's mistake: one line saying what was given, what is needed and what to do.

    The command line prints it and exits with 2; a library caller catches it as a ValueError.
    """
