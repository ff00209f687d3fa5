"""Errors that end as one line on the user's terminal."""

_MOST_CHARACTERS = 300


class UserError(ValueError):
    """A mistake that the user can mend. Its text is one line that says what is wrong and what to do.

    The command line prints it and exits with status 2, without a traceback.
    """


class WireError(UserError):
    """A message that cannot be trusted: its text names the field and what is wrong with it.

    What a sender wrote may be part of the text, so it is cut: it goes into statistics, logs and summaries.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}...")


class CheckpointError(UserError):
    """A checkpoint that cannot be loaded: its text names the file and what is wrong with it."""


class NonFiniteError(RuntimeError):
    """A loss, reward or parameter that is NaN or infinite. Its text says where it was met and what was saved."""
