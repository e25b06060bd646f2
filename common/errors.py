"""Errors that a user can mend: one line that names the flag or file:line and what to do."""

# SPDX-License-Identifier: Apache-2.0


class UserError(Exception):
    """Base of all errors that end a program with one line instead of a traceback."""

    exit_status = 1


class ConfigError(UserError):
    """A flag, or a combination of flags, that cannot work. Message: "--flag value: why; what to do"."""

    exit_status = 2


class DataError(UserError):
    """A file of the user's data that cannot be used. Message: "file:line: why; what to do"."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not fit. Message: "file: why; what to do"."""


class TrainingError(UserError):
    """A run that cannot go on. Message: why, where the last good checkpoint is, what to do."""
