"""Package, copy, install and fetch in one go, over the user's own ssh client.

Needs a shell, cat, head, sha256sum and python3 on the device. Each step looks at what is there
already, so that a repeated call goes on at the last byte that arrived, or after the install.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_deploy.delivery.package import INSTALLER, make_package
from mpq_deploy.device.archive import MANIFEST, pieces, read_archive
from mpq_deploy.device.installer import RESULTS, read_results
from mpq_deploy.errors import EngineError, UsageError
from mpq_deploy.system.files import file_digest

if TYPE_CHECKING:
    from mpq_deploy.engine.target import Target
    from mpq_deploy.run.view import Run
    from mpq_deploy.system.progress import Talk

PIECE = 1 << 18
# What ssh itself returns when there is no connection; commands of ours return less.
SSH_FAILED = 255
KEPT = ".deploy"


@dataclass(frozen=True)
class Remote:
    """A device that ssh reaches: ``destination`` as for ssh, ``command`` the client with options.

    ``folder`` lies in the remote home unless absolute; ``python`` runs the installer.
    """

    destination: str
    command: tuple[str, ...] = ("ssh",)
    folder: str = "mpq-deploy"
    python: str = "python3"

    def __post_init__(self) -> None:
        # ssh would take it as an option.
        if not self.destination or self.destination.startswith("-"):
            what = f"'{self.destination}' is no ssh destination."
            raise UsageError(what, "Give user@host, as for ssh.")

    def argv(self, script: str) -> list[str]:
        """The command line that runs ``script`` in a shell there."""
        return [*self.command, "--", self.destination, script]

    def run(self, script: str, accept: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
        """Run ``script``; EngineError when ssh fails or the exit code is none of ``accept``."""
        try:
            done = subprocess.run(
                self.argv(script), capture_output=True, encoding="utf-8", check=False
            )
        except FileNotFoundError as error:
            what = f"There is no '{self.command[0]}' on this machine."
            raise UsageError(what, "Install an ssh client.") from error
        if done.returncode not in accept:
            raise self.failure(done.returncode, done.stderr)
        return done

    def failure(self, code: int, text: str) -> EngineError:
        """Say what went wrong, and that the next call goes on."""
        words = " ".join(text.split())[-300:] or "no reason given"
        what = "ssh failed" if code == SSH_FAILED else f"A command ended with code {code}"
        again = "Repeat the command when the connection is back: it goes on where it stopped."
        return EngineError(
            f"{what} on {self.destination}: {words}", again if code == SSH_FAILED else ""
        )


def deploy(run: Run, target: Target, remote: Remote) -> dict[str, Any]:
    """Package the run, install it on ``remote``, keep its results in the run folder; return them.

    Raises EngineError when ssh or the installer fails, and what ``make_package`` raises.
    """
    from mpq_deploy.delivery.device_results import take_in

    talk = run.talk
    kept = run.path / KEPT
    kept.mkdir(exist_ok=True)
    archive = kept / f"{target.name}.mpq.tar"
    written = make_package(run, target, archive)
    talk.line(f"packaged {archive}, {written['bytes']:,} bytes")
    name = f"{written['sha256'][:16]}.mpq.tar"
    remote.run(f"mkdir -p {shlex.quote(remote.folder)}")
    upload(remote, archive, name, talk)
    fetched = _installed(remote, archive, name)
    if fetched is None:
        _install(remote, name, talk)
        fetched = _installed(remote, archive, name)
    else:
        talk.line("already installed there")
    if fetched is None:
        raise EngineError(
            f"The installer on {remote.destination} left no {RESULTS} of this package."
        )
    results = kept / RESULTS
    results.write_text(fetched, encoding="utf-8")
    take_in(run, results)
    return read_results(results)


def upload(remote: Remote, archive: Path, name: str, talk: Talk) -> None:
    """Bring ``archive`` to ``remote.folder/name``, going on after a beginning of it that is there."""
    digest, size = file_digest(archive), archive.stat().st_size
    part, whole = (shlex.quote(f"{remote.folder}/{one}") for one in (f"{name}.part", name))
    script = f"[ -f {whole} ] && sha256sum < {whole} || [ -f {part} ] && wc -c < {part} || echo 0"
    there = remote.run(script).stdout
    if there.split()[:1] == [digest]:
        talk.line("the archive is there already")
        return
    start = _good_bytes(remote, archive, part, there)
    if start:
        talk.line(f"going on after {start:,} bytes that arrived before")
    else:
        remote.run(f": > {part}")
    _send(remote, archive, part, start, size, talk)
    if remote.run(f"sha256sum < {part}").stdout.split()[:1] != [digest]:
        remote.run(f"rm -f {part}")
        what = f"The archive arrived altered on {remote.destination}."
        raise EngineError(what, "Repeat the command: it starts anew.")
    remote.run(f"mv {part} {whole}")


def _good_bytes(remote: Remote, archive: Path, part: str, listed: str) -> int:
    """Count the bytes of ``archive`` that are there, if they are a beginning of it; else 0."""
    first = (listed.split() or ["0"])[0]
    count = int(first) if first.isdecimal() else 0
    if not 0 < count <= archive.stat().st_size:
        return 0
    digest = hashlib.sha256()
    with archive.open("rb") as file:
        for piece in pieces(file, count):
            digest.update(piece)
    there = remote.run(f"head -c {count} {part} | sha256sum").stdout.split()[:1]
    return count if there == [digest.hexdigest()] else 0


def _send(remote: Remote, archive: Path, part: str, start: int, size: int, talk: Talk) -> None:
    """Append the bytes of ``archive`` from ``start`` on."""
    argv = remote.argv(f"cat >> {part}")
    with talk.bar("bytes to the device", size - start) as advance, _process(argv) as process:
        assert process.stdin is not None
        sent = _feed(process.stdin.write, archive, start, advance)
        text = _ended(process)
    if process.returncode != 0 or not sent:
        raise remote.failure(process.returncode or SSH_FAILED, text)


def _feed(
    write: Callable[[bytes], Any], archive: Path, start: int, advance: Callable[[int], None]
) -> bool:
    """Write the rest of ``archive``; False when the other side went away."""
    with archive.open("rb") as file:
        file.seek(start)
        while piece := file.read(PIECE):
            try:
                write(piece)
            except BrokenPipeError:
                return False
            advance(len(piece))
    return True


def _ended(process: subprocess.Popen[bytes]) -> str:
    """Close the input, wait, and return what stands on stderr."""
    try:
        return process.communicate()[1].decode(errors="replace")
    except BrokenPipeError:
        process.wait()
        return "the connection was lost"


@contextmanager
def _process(argv: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _install(remote: Remote, name: str, talk: Talk) -> None:
    """Run the archive's installer there. Exit code 1 may mean failed checks: results are fetched."""
    folder, python = shlex.quote(remote.folder), shlex.quote(remote.python)
    talk.line(f"installing on {remote.destination} (building takes minutes on a small device)")
    script = (
        f"cd {folder} && tar xOf {name} {INSTALLER} > {name}.{INSTALLER} && "
        f"{python} {name}.{INSTALLER} {name} -o {name}.installed"
    )
    done = remote.run(script, accept=(0, 1))
    for line in (done.stderr + done.stdout).splitlines():
        talk.line(f"  {line}")
    if done.returncode and RESULTS not in done.stdout:
        what = (
            f"The installer failed on {remote.destination}: {' '.join(done.stderr.split())[-300:]}"
        )
        raise EngineError(what, "The message says what to change there.")


def _installed(remote: Remote, archive: Path, name: str) -> str | None:
    """The results.json there, if it is of this very package; None when there is none."""
    path = shlex.quote(f"{remote.folder}/{name}.installed/{RESULTS}")
    text = remote.run(f"cat {path} 2>/dev/null || true").stdout
    if not text.strip():
        return None
    digest = read_archive(archive)[MANIFEST].sha256
    try:
        matches = json.loads(text)["package"]["manifest_sha256"] == digest
    except (ValueError, KeyError, TypeError):
        return None
    return text if matches else None
