"""The exit codes of the command line, and the expected failures that have one of their own."""

from __future__ import annotations

from enum import IntEnum

from clusterpool.errors import ClusterpoolError


class ExitCode(IntEnum):
    """What a command's end means; docs/cli.md tells users the same."""

    OK = 0
    FAILED = 1
    USAGE = 2  # wrong options, or a cluster file that is wrong: nothing was done
    NO_CLUSTER = 3
    ALREADY_RUNNING = 4
    INCOMPLETE = 5  # done in part: some node did not end, or had to be killed
    INTERRUPTED = 130  # Ctrl-C, as shells have it


class CommandFailed(ClusterpoolError):
    """A command could not do what it was asked to; the text says why and what to do."""

    exit_code = ExitCode.FAILED


class NoCluster(CommandFailed):
    """There is no living cluster to act on."""

    exit_code = ExitCode.NO_CLUSTER


class AlreadyRunning(CommandFailed):
    """A cluster of this user runs on this host already."""

    exit_code = ExitCode.ALREADY_RUNNING


class WrongFile(CommandFailed):
    """A file that the user gave is not what the command needs."""

    exit_code = ExitCode.USAGE
