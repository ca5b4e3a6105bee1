"""Deploying over ssh: against a real sshd on loopback, with TensorRT-RTX as the remote's TensorRT."""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpq_deploy.delivery.deploy import Remote, deploy, upload
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import EngineError, UsageError
from mpq_deploy.recipe import Recipe
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.system.progress import Talk
from tests.pipeline.runs import Notes

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
needs_sshd = pytest.mark.skipif(
    not Path(SSHD).exists() or shutil.which("ssh") is None,
    reason="openssh-server is not installed here",
)


def key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running sshd; the folder holds ``config`` for the client, host keys known."""
    folder = tmp_path_factory.mktemp("sshd")
    host, user = key(folder / "host"), key(folder / "user")
    shutil.copy(user.with_suffix(".pub"), folder / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = f"Port {port}\nListenAddress 127.0.0.1\nHostKey {host}\nAuthorizedKeysFile {folder / 'authorized'}\n"
    (folder / "sshd").write_text(
        f"{settings}StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\n",
        encoding="utf-8",
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    known = " ".join(host.with_suffix(".pub").read_text(encoding="utf-8").split()[:2])
    (folder / "known").write_text(f"[127.0.0.1]:{port} {known}\n", encoding="utf-8")
    (folder / "config").write_text(
        f"Host device\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n IdentityFile {user}\n"
        f" IdentitiesOnly yes\n UserKnownHostsFile {folder / 'known'}\n BatchMode yes\n",
        encoding="utf-8",
    )
    process = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", str(folder / "sshd")], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield folder
    process.terminate()
    process.wait()


def remote(server: Path, folder: Path, python: str = sys.executable) -> Remote:
    return Remote("device", ("ssh", "-F", str(server / "config")), str(folder), python)


@needs_sshd
@pytest.mark.rtx
def test_a_run_is_deployed_and_a_second_call_finds_it_installed(
    server: Path, rtx_run: tuple[Recipe, Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    run = Path(shutil.copytree(rtx_run[1], tmp_path / "run"))
    device = remote(server, tmp_path / "device with a space")
    for expected in ("installing on device", "already installed there"):
        notes = Notes()
        with open_pipeline(rtx_run[0], run, notes) as pipeline:
            results = deploy(pipeline.deployed(corrected=True), load_target("rtx"), device)
        assert results["engine"]["verified"]
        assert any(expected in line for line in notes.lines), notes.lines
    assert (run / "devices" / "rtx.json").is_file()


@needs_sshd
def test_an_upload_goes_on_after_what_arrived_if_that_is_its_beginning(
    server: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(os.urandom(1_000_000))
    there = tmp_path / "there"
    there.mkdir()
    device = remote(server, there)
    (there / "n.part").write_bytes(archive.read_bytes()[:300_000])
    notes = Notes()
    upload(device, archive, "n", notes)
    assert notes.lines == ["resuming after 300,000 bytes that arrived before"]
    assert (there / "n").read_bytes() == archive.read_bytes()
    notes = Notes()
    upload(device, archive, "n", notes)
    assert notes.lines == ["the archive is there already"]
    (there / "n").write_bytes(b"x")
    (there / "n.part").write_bytes(b"y" * 500)
    upload(device, archive, "n", Talk())
    assert (there / "n").read_bytes() == archive.read_bytes()
    assert sorted(p.name for p in there.iterdir()) == ["n"]


@needs_sshd
def test_a_connection_that_breaks_in_the_middle_is_resumed(server: Path, tmp_path: Path) -> None:
    """The first client stops after 400,000 bytes, as a lost connection does."""
    archive, there = tmp_path / "a.tar", tmp_path / "there"
    archive.write_bytes(os.urandom(3_000_000))
    there.mkdir()
    real = shlex.join(["ssh", "-F", str(server / "config")])
    broken = tmp_path / "broken"
    broken.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f'*"cat >>"*) head -c 400000 | {real} "$@"; exit 255 ;;\n'
        f'*) exec {real} "$@" ;;\nesac\n',
        encoding="utf-8",
    )
    broken.chmod(0o755)
    with pytest.raises(EngineError) as caught:
        upload(Remote("device", (str(broken),), str(there)), archive, "n", Talk())
    assert "continues where it stopped" in caught.value.hint
    assert (there / "n.part").stat().st_size == 400_000
    notes = Notes()
    upload(remote(server, there), archive, "n", notes)
    assert "resuming after 400,000 bytes" in notes.lines[0]
    assert (there / "n").read_bytes() == archive.read_bytes()


@needs_sshd
def test_an_unknown_host_key_is_refused(server: Path, tmp_path: Path) -> None:
    other = key(tmp_path / "other").with_suffix(".pub").read_text(encoding="utf-8").split()[1]
    line = (server / "known").read_text(encoding="utf-8").split()
    (tmp_path / "known").write_text(f"{line[0]} {line[1]} {other}\n", encoding="utf-8")
    config = (
        (server / "config")
        .read_text(encoding="utf-8")
        .replace(str(server / "known"), str(tmp_path / "known"))
    )
    (tmp_path / "config").write_text(config, encoding="utf-8")
    with pytest.raises(
        EngineError, match=r"ssh failed on device: .*[Hh]ost key verification failed"
    ):
        Remote("device", ("ssh", "-F", str(tmp_path / "config"))).run("true")


@needs_sshd
def test_an_installer_that_fails_there_says_why(
    server: Path, rtx_run: tuple[Recipe, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(rtx_run[1], tmp_path / "run"))
    with (
        open_pipeline(rtx_run[0], run, Talk()) as pipeline,
        pytest.raises(EngineError, match="code 127"),
    ):
        deploy(
            pipeline.deployed(corrected=True),
            load_target("rtx"),
            remote(server, tmp_path / "d", python="no-such-python"),
        )


@pytest.mark.parametrize("destination", ["", "-oProxyCommand=touch /tmp/owned"])
def test_a_destination_that_is_an_option_is_refused(destination: str) -> None:
    with pytest.raises(UsageError, match="not an ssh destination"):
        Remote(destination)


def test_a_missing_client_says_so() -> None:
    with pytest.raises(UsageError, match="no 'no-such-ssh' on this machine"):
        Remote("device", ("no-such-ssh",)).run("true")
