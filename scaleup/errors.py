"""Errors that a command prints in plain sentences, without a traceback."""


class ScaleupError(Exception):
    """Base class of the errors that a command prints without a traceback."""


class ConfigError(ScaleupError, ValueError):
    """A problem that the user must solve before the command can start.

    Args:
        problems: one plain sentence per problem.
    """

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class PermissionMissing(ConfigError):
    """A run folder asks to execute code that the user has not allowed on the command line."""


class CheckpointError(ScaleupError, ValueError):
    """A folder is not a complete, unaltered checkpoint."""


class RunError(ScaleupError, RuntimeError):
    """A run cannot continue. The checkpoints that it saved remain."""


class Preempted(ScaleupError):
    """A run was asked to stop and has saved its state."""


class ExportError(ScaleupError, RuntimeError):
    """An export cannot be made, or failed its verification. Nothing is left under its name."""


def one_line(error: BaseException, length: int | None = None) -> str:
    """Return the message of an error without line breaks, cut to `length` characters."""
    return " ".join(str(error).split())[:length]
