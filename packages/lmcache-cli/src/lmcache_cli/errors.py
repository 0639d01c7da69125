"""Errors of the command line, and the exit status each of them ends in.

CommandError                 base; its text is one sentence for a person, ``code`` is for scripts
├── UsageFault               what was typed cannot work (exit 2)
├── Interrupted          ctrl-C (exit 130)
├── InstallConflict          both distributions are installed; also an ImportError (exit 78)
└── ServerError              the other side (exit 1)
    ├── Unreachable          no connection
    │   └── TimedOut         no answer within the deadline
    ├── HttpFailure          an answer other than 200; ``status`` is its number
    ├── BadAnswer            an answer we cannot read
    ├── WrongService         something else answers at this address
    ├── CutShort             a stream that stopped before its end
    └── Unhealthy            the service answers, and says that it is not healthy
"""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """Every exit status the command line uses."""

    OK = 0
    FAILED = 1  # unreachable, unhealthy, or the work failed
    USAGE = 2
    CONFLICT = 78  # EX_CONFIG of sysexits.h: both distributions are installed
    INTERRUPTED = 130  # ctrl-C


class CommandError(Exception):
    """Base of everything the command line raises on purpose."""

    code = "failed"
    exit_status = ExitStatus.FAILED


class UsageFault(CommandError):
    """What was typed cannot work."""

    code = "usage"
    exit_status = ExitStatus.USAGE


class Interrupted(CommandError):
    """Somebody pressed ctrl-C."""

    code = "interrupted"
    exit_status = ExitStatus.INTERRUPTED


class InstallConflict(CommandError, ImportError):
    """Both distributions are installed in one environment."""

    code = "install_conflict"
    exit_status = ExitStatus.CONFLICT


class ServerError(CommandError):
    """The other side could not be reached, or did not do what was asked."""


class Unreachable(ServerError):
    """No connection."""

    code = "unreachable"


class TimedOut(Unreachable):
    """No answer within the deadline."""

    code = "timeout"


class HttpFailure(ServerError):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = f"http_{status}"


class BadAnswer(ServerError):
    """An answer we cannot read."""

    code = "bad_answer"


class WrongService(ServerError):
    """Something else answers at this address."""

    code = "wrong_service"


class CutShort(ServerError):
    """A stream that stopped before its end."""

    code = "cut_short"


class Unhealthy(ServerError):
    """The service answers, and says that it is not healthy."""

    code = "unhealthy"
