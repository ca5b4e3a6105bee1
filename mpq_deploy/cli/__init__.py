"""The command line: parse, call, print. stdout carries data, stderr carries talk."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from mpq_deploy.cli.app import State, app
from mpq_deploy.errors import MpqError
from mpq_deploy.system.stdout import claim_stdout

# Importing a group of commands adds it to the application; --help shows the groups in this order.
# isort: off
from mpq_deploy.cli import build, results, devices, machine
# isort: on

__all__ = ["app", "build", "devices", "machine", "main", "results"]


class _Stopped(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt, which typer would turn into a silent exit."""


def _stop(number: int, frame: object) -> None:
    raise _Stopped


def main() -> None:
    """Run the command line; our own errors become one message and an exit code, without a traceback."""
    claim_stdout()
    signal.signal(signal.SIGINT, _stop)
    try:
        app()
    except MpqError as error:
        if State.debug:
            raise
        sys.stderr.write(f"mpq-deploy: {error.message}\n")
        if error.hint:
            sys.stderr.write(f"  {error.hint}\n")
        sys.exit(error.exit_code)
    except _Stopped:
        sys.stderr.write(
            "mpq-deploy: stopped; the next call goes on from the last finished stage\n"
        )
        sys.exit(130)
    except OSError as error:
        if State.debug:
            raise
        from mpq_deploy.system.files import disk_error

        sys.stderr.write(f"mpq-deploy: {disk_error(error, Path())}\n")
        sys.exit(1)
