"""The two ways a run ends that are nobody's bug; everything else keeps its traceback."""


class UserError(Exception):
    """A mistake in a setting or an input.

    The message is one paragraph: which setting, what it was, what would do. Entry points print it without a traceback and
    exit with status 2, and retries are pointless.
    """

    exit_status = 2


class TrainingError(UserError):
    """Training had to stop although its settings were valid: a loss that is not finite, a full disk. Exit status 1."""

    exit_status = 1
