"""The command line: parse, call, print. stdout carries data, stderr carries talk."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from mpq_deploy.cli.app import State, app
from mpq_deploy.errors import MpqError, UsageError
from mpq_deploy.system.import_path import drop_current_folder
from mpq_deploy.system.libraries import start_lightly
from mpq_deploy.system.names import printable
from mpq_deploy.system.stdout import claim_stdout
from mpq_deploy.system.threads import keep_to_quota

# Importing a group of commands adds it to the application; --help shows the groups in this order.
# isort: off
from mpq_deploy.cli import build, results, devices, generate, machine
# isort: on

# Exit code for an error of our own (EX_SOFTWARE of sysexits.h); the others: docs/troubleshooting.md.
UNEXPECTED = 70
LONGEST_LINE = 300

__all__ = ["app", "build", "devices", "generate", "machine", "main", "results"]


class _Stopped(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt, which typer would turn into a silent exit."""


def _stop(number: int, frame: object) -> None:
    raise _Stopped


def main() -> None:
    """Run the command line; every error becomes a message and an exit code, without a traceback."""
    claim_stdout()
    start_lightly()
    keep_to_quota()
    drop_current_folder()
    signal.signal(signal.SIGINT, _stop)
    try:
        _check_folder()
        app()
    except _Stopped:
        sys.stderr.write(
            "mpq-deploy: stopped; the next call continues from the last finished stage\n"
        )
        sys.exit(130)
    except Exception as error:
        if State.debug:
            raise
        sys.exit(_report(error))
    finally:
        _write_rest()


def _write_rest() -> None:
    """Write what stdout still holds; a reader that has read enough, such as head, is no error."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_folder() -> None:
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(
            f"The current folder cannot be used: {error.strerror}.",
            "Change to a folder that exists.",
        ) from error


def _report(error: Exception) -> int:
    """Write one line about ``error``, and one that says what to do; return the exit code."""
    if isinstance(error, OSError):
        from mpq_deploy.system.files import disk_error

        error = disk_error(error, None)
    if isinstance(error, MpqError):
        message, hint, code = error.message, error.hint, error.exit_code
    else:
        said = " ".join(str(error).split())
        message = f"an error that should not happen: {type(error).__name__}: {said[:LONGEST_LINE]}"
        hint = "Please report it with what the same command prints after 'mpq-deploy --debug'."
        code = UNEXPECTED
    sys.stderr.write(f"mpq-deploy: {printable(message)}\n")
    if hint:
        sys.stderr.write(f"  {printable(hint)}\n")
    return code
