"""Package, copy, install and fetch in one go, over the user's own ssh client.

Needs a shell, cat, head, sha256sum and python3 on the device. Each step looks at what is there
already, so that a repeated call continues at the last byte that arrived, or after the install.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_deploy.delivery.package import INSTALLER, make_package
from mpq_deploy.device.archive import MANIFEST, pieces, read_archive
from mpq_deploy.device.manifest import RESULTS
from mpq_deploy.errors import EngineError, InputError, UsageError
from mpq_deploy.system.children import Collected, run_bounded
from mpq_deploy.system.files import file_digest, write_text
from mpq_deploy.system.inputs import as_object, parse_json
from mpq_deploy.system.names import printable

if TYPE_CHECKING:
    from mpq_deploy.engine.target import Target
    from mpq_deploy.run.view import Run
    from mpq_deploy.system.progress import Talk

PIECE = 1 << 18
# What ssh itself returns when there is no connection; commands of ours return less.
SSH_FAILED = 255
KEPT = ".deploy"
# How long one command on the device may take, the installer, and the copying of one piece (our
# choice): digesting some gigabytes takes minutes there, building an engine can take an hour.
STEP_SECONDS, INSTALL_SECONDS, STALLED_SECONDS = 1800.0, 6 * 3600.0, 300.0
AGAIN = "Repeat the command when the connection is back: it continues where it stopped."


@dataclass(frozen=True)
class Remote:
    """A device that ssh reaches: ``destination`` as given to ssh, ``command`` the client with options.

    ``folder`` lies in the remote home unless absolute; ``python`` runs the installer.
    """

    destination: str
    command: tuple[str, ...] = ("ssh",)
    folder: str = "mpq-deploy"
    python: str = "python3"

    def __post_init__(self) -> None:
        # ssh would take it as an option.
        if not self.destination.isprintable() or self.destination[:1] in ("", "-"):
            what = f"'{printable(self.destination)}' is not an ssh destination."
            raise UsageError(what, "Give user@host, as you give it to ssh.")
        if not self.folder or not self.folder.isprintable():
            raise UsageError(f"'{printable(self.folder)}' is not a folder.", "See --folder.")
        if re.match(r"~[^/]", self.folder):
            what = f"'{self.folder}' is the home of another user."
            raise UsageError(what, "Give its absolute path: --folder /home/USER/...")

    @property
    def place(self) -> str:
        """``folder`` as a path for the shell there, quoted; its own home is where ssh starts."""
        inside = re.sub(r"^~/*", "", self.folder) if self.folder.startswith("~") else self.folder
        # A name that begins with a dash would be an option.
        return shlex.quote(inside if inside.startswith("/") else f"./{inside}")

    def argv(self, script: str) -> list[str]:
        """The command line that runs ``script`` in a shell there."""
        return [*self.command, "--", self.destination, script]

    def run(
        self, script: str, accept: tuple[int, ...] = (0,), seconds: float = STEP_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run ``script``.

        Raises EngineError when ssh fails, the exit code is not one of ``accept``, it takes longer than
        ``seconds``, or the device sends more than ``children.OUTPUT_BYTES``.
        """
        try:
            done = run_bounded(self.argv(script), seconds=seconds)
        except subprocess.TimeoutExpired as error:
            what = f"{self.destination} did not answer within {seconds / 60:.0f} minutes."
            raise EngineError(what, AGAIN) from error
        except FileNotFoundError as error:
            what = f"There is no '{self.command[0]}' on this machine."
            raise UsageError(what, "Install an ssh client.") from error
        if done.returncode not in accept:
            raise self.failure(done.returncode, done.stderr)
        return done

    def failure(self, code: int, text: str) -> EngineError:
        """Say what went wrong, and that the next call continues."""
        words = " ".join(text.split())[-300:] or "no reason given"
        what = "ssh failed" if code == SSH_FAILED else f"A command exited with code {code}"
        return EngineError(
            f"{what} on {self.destination}: {words}", AGAIN if code == SSH_FAILED else ""
        )


def deploy(run: Run, target: Target, remote: Remote) -> dict[str, Any]:
    """Package the run, install it on ``remote``, keep its results in the run folder; return them.

    Raises EngineError when ssh or the installer fails, and what ``make_package`` raises.
    """
    from mpq_deploy.delivery.device_results import read_results, take_in

    def packed(archive: Path) -> dict[str, Any]:
        return make_package(run, target, archive)

    results = _deliver(run.path, target, remote, run.talk, packed)
    return read_results(take_in(run, results)).model_dump(mode="json")


def deploy_whole(path: Path, target: Target, remote: Remote, talk: Talk) -> dict[str, Any]:
    """Deploy the run of a whole pipeline at ``path`` as ``deploy`` does; return its results.

    They are kept in the run, and each component's in its own.
    """
    from mpq_deploy.delivery.whole_package import make_whole_package
    from mpq_deploy.delivery.whole_results import take_in_whole

    def packed(archive: Path) -> dict[str, Any]:
        return make_whole_package(path, target, archive, talk)

    results = _deliver(path, target, remote, talk, packed)
    values = as_object(parse_json(results.read_text(encoding="utf-8"), RESULTS), RESULTS)
    take_in_whole(path, results, talk)
    return values


def _deliver(
    run: Path,
    target: Target,
    remote: Remote,
    talk: Talk,
    packed: Callable[[Path], dict[str, Any]],
) -> Path:
    """Package, copy and install; return the file of the results."""
    kept = run / KEPT
    kept.mkdir(exist_ok=True)
    archive = kept / f"{target.name}.mpq.tar"
    written = packed(archive)
    talk.line(f"packaged {archive}, {written['bytes']:,} bytes")
    name = f"{written['sha256'][:16]}.mpq.tar"
    remote.run(f"mkdir -p {remote.place}")
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
    write_text(results, fetched)
    return results


def upload(remote: Remote, archive: Path, name: str, talk: Talk) -> None:
    """Copy ``archive`` to ``remote.folder/name``, resuming after the part that is already there."""
    digest, size = file_digest(archive), archive.stat().st_size
    part, whole = (f"{remote.place}/{shlex.quote(one)}" for one in (f"{name}.part", name))
    script = f"[ -f {whole} ] && sha256sum < {whole} || [ -f {part} ] && wc -c < {part} || echo 0"
    there = remote.run(script).stdout
    if there.split()[:1] == [digest]:
        talk.line("the archive is there already")
        return
    start = _good_bytes(remote, archive, part, there)
    if start:
        talk.line(f"resuming after {start:,} bytes that arrived before")
    else:
        remote.run(f": > {part}")
    _send(remote, archive, part, start, size, talk)
    if remote.run(f"sha256sum < {part}").stdout.split()[:1] != [digest]:
        remote.run(f"rm -f {part}")
        what = f"The archive on {remote.destination} differs from the one that was sent."
        raise EngineError(what, "Repeat the command: it starts over.")
    remote.run(f"mv {part} {whole}")


def _good_bytes(remote: Remote, archive: Path, part: str, listed: str) -> int:
    """Count the bytes of ``archive`` that are there, if they are its first ones; else 0."""
    first = (listed.split() or ["0"])[0]
    count = int(first) if first.isdecimal() and len(first) < 19 else 0
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
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        remote.argv(f"cat >> {part}"), stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe
    )
    assert process.stdin is not None and process.stderr is not None
    said = Collected(process, process.stderr)
    with talk.bar("bytes to the device", size - start) as advance, _watched(process) as moved:

        def report(count: int) -> None:
            advance(count)
            moved()

        sent = _feed(process.stdin.write, archive, start, report)
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()
    said.end()
    if process.returncode != 0 or not sent:
        text = said.text() or "the connection was lost, or nothing arrived for several minutes"
        raise remote.failure(process.returncode if process.returncode > 0 else SSH_FAILED, text)


@contextmanager
def _watched(process: subprocess.Popen[bytes]) -> Iterator[Callable[[], None]]:
    """Kill ``process`` at the end, or once nobody called the yielded function for some minutes."""
    ended, last = threading.Event(), [time.monotonic()]

    def moved() -> None:
        last[0] = time.monotonic()

    def watch() -> None:
        while not ended.wait(1.0):
            if time.monotonic() - last[0] > STALLED_SECONDS:
                process.kill()
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield moved
    finally:
        ended.set()
        if process.poll() is None:
            process.kill()
            process.wait()


def _feed(
    write: Callable[[bytes], Any], archive: Path, start: int, advance: Callable[[int], None]
) -> bool:
    """Write the rest of ``archive``; False if the connection was lost."""
    with archive.open("rb") as file:
        file.seek(start)
        while piece := file.read(PIECE):
            try:
                write(piece)
            except BrokenPipeError:
                return False
            advance(len(piece))
    return True


def _install(remote: Remote, name: str, talk: Talk) -> None:
    """Run the archive's installer there. Exit code 1 may mean failed checks: results are fetched."""
    folder, python = remote.place, shlex.quote(remote.python)
    talk.line(f"installing on {remote.destination} (building takes minutes on a small device)")
    script = (
        f"cd {folder} && tar xOf {name} {INSTALLER} > {name}.{INSTALLER} && "
        f"{python} {name}.{INSTALLER} {name} -o {name}.installed"
    )
    done = remote.run(script, accept=(0, 1), seconds=INSTALL_SECONDS)
    for line in (done.stderr + done.stdout).splitlines():
        talk.line(f"  {line}")
    if done.returncode and RESULTS not in done.stdout:
        what = (
            f"The installer failed on {remote.destination}: {' '.join(done.stderr.split())[-300:]}"
        )
        raise EngineError(what, "The message says what to change on the device.")


def _installed(remote: Remote, archive: Path, name: str) -> str | None:
    """The results.json there, if it is of this very package; None when there is none."""
    path = f"{remote.place}/{shlex.quote(f'{name}.installed')}/{RESULTS}"
    text = remote.run(f"cat {path} 2>/dev/null || true").stdout
    if not text.strip():
        return None
    digest = read_archive(archive)[MANIFEST].sha256
    try:
        values = as_object(parse_json(text, RESULTS), RESULTS)
        package = as_object(values.get("package"), RESULTS)
    except InputError:
        return None
    return text if package.get("manifest_sha256") == digest else None
