"""Errors that a user can act on: one line, no traceback."""

from __future__ import annotations

import errno


class TrainError(Exception):
    """What stopped the training, in one line.

    Attributes:
        exit_code: the exit status of the command, 2 for wrong arguments and 1 for all else.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(TrainError):
    """An argument outside its rule: exit status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


def first_line(error: BaseException, most: int = 300) -> str:
    """An exception's message on one line; its class where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:most]


def saving_failed(what: str, path: object, error: OSError) -> TrainError:
    """The line for a file that could not be written."""
    if error.errno == errno.ENOSPC:
        reason = "the disk is full"
    else:
        reason = error.strerror or first_line(error)
    return TrainError(f"{what} could not be saved to {path}: {reason}; what was saved before is intact")
