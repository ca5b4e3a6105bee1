"""Signatures as minisign makes and checks them, held against the real tool."""

from __future__ import annotations

import builtins
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mpq_deploy.cli import app
from mpq_deploy.device import installer
from mpq_deploy.device.archive import ArchiveError
from mpq_deploy.device.installer import Trust
from mpq_deploy.device.signature import (
    PASSWORD,
    SignatureError,
    read_public_key,
    read_secret_key,
    sign,
    verify,
)
from mpq_deploy.errors import UsageError
from mpq_deploy.report.seal import report_json
from mpq_deploy.system.files import file_digest
from tests.report.sample_report import make_report

# Made by minisign 0.11: keys without and with a password ("secret"), a file and its signatures.
REAL = Path(__file__).with_name("minisign")
needs_minisign = pytest.mark.skipif(
    shutil.which("minisign") is None, reason="the program minisign is not installed"
)


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """A file signed by us with the real tool's key."""
    path = tmp_path / "model.mpq.tar"
    path.write_bytes(bytes(range(256)) * 100)
    sign(path, read_secret_key(REAL / "plain.key"))
    return path


def test_what_the_real_tool_signed_is_accepted() -> None:
    key = read_public_key(str(REAL / "plain.pub"))
    assert verify(REAL / "package.txt", key) == "by the real tool"
    text = (REAL / "plain.pub").read_text(encoding="utf-8").splitlines()[1]
    assert read_public_key(text) == key


@needs_minisign
def test_the_real_tool_accepts_what_we_sign(signed: Path) -> None:
    command = ["minisign", "-V", "-m", str(signed), "-p", str(REAL / "plain.pub")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout and f"file:{signed.name}" in done.stdout
    signed.write_bytes(b"another")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_a_signature_has_the_same_bytes_each_time(signed: Path) -> None:
    beside = signed.with_name(signed.name + ".minisig")
    first = beside.read_bytes()
    sign(signed, read_secret_key(REAL / "plain.key"))
    assert beside.read_bytes() == first


def test_every_altered_byte_of_a_signature_or_file_is_refused(signed: Path) -> None:
    key = read_public_key(str(REAL / "plain.pub"))
    beside = signed.with_name(signed.name + ".minisig")
    whole = beside.read_bytes()
    # The first line is said to be untrusted.
    for place in range(whole.index(b"\n") + 1, len(whole) - 1):
        beside.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(SignatureError):
            verify(signed, key)
    beside.write_bytes(whole)
    verify(signed, key)
    signed.write_bytes(signed.read_bytes()[:-1] + b"x")
    with pytest.raises(SignatureError, match="is wrong"):
        verify(signed, key)


def test_another_key_an_old_form_and_no_signature_are_refused(signed: Path, tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match="not with the trusted"):
        verify(signed, read_public_key(str(REAL / "sealed.pub")))
    key = read_public_key(str(REAL / "plain.pub"))
    signed.with_name(signed.name + ".minisig").unlink()
    with pytest.raises(SignatureError, match="There is no file"):
        verify(signed, key)
    for name, to in (("package.txt", "p"), ("old.minisig", "p.minisig")):
        shutil.copy(REAL / name, tmp_path / to)
    with pytest.raises(SignatureError, match="old form"):
        verify(tmp_path / "p", key)


def test_a_key_with_a_password_is_opened_by_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD, "secret")
    path = tmp_path / "f"
    path.write_bytes(b"x")
    sign(path, read_secret_key(REAL / "sealed.key"))
    verify(path, read_public_key(str(REAL / "sealed.pub")))
    monkeypatch.setenv(PASSWORD, "wrong")
    with pytest.raises(UsageError, match="password is wrong"):
        read_secret_key(REAL / "sealed.key")


@pytest.mark.parametrize("text", ["", "x", "RW" + "A" * 54, "\x00" * 60, "RWQf6LRCGA9i53mlYecO4Iz"])
def test_what_is_no_key_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(text, encoding="utf-8")
    for read in (lambda p: read_public_key(str(p)), read_secret_key):
        with pytest.raises(UsageError) as caught:
            read(tmp_path / "key")
        assert "\n" not in str(caught.value)


def test_an_archive_is_what_trust_says_before_anything_of_it_is_read(
    signed: Path, tmp_path: Path
) -> None:
    pub, digest = str(REAL / "plain.pub"), file_digest(signed)

    def install(trust: Trust) -> Any:
        return installer.install(signed, tmp_path / "out", installer.Talk(), trust=trust)

    # It is no package: that is what is said once it is trusted.
    for good in (Trust(digest), Trust(key=pub), Trust(digest.upper(), pub)):
        with pytest.raises(ArchiveError, match="not a package"):
            install(good)
    with pytest.raises(ArchiveError, match="has the SHA-256"):
        install(Trust("0" * 64))
    with pytest.raises(UsageError, match=r"is not a SHA-256"):
        install(Trust("12"))
    with pytest.raises(SignatureError, match="not with the trusted"):
        install(Trust(digest, str(REAL / "sealed.pub")))
    with pytest.raises(UsageError, match="is a folder"):
        installer.install(tmp_path, tmp_path, installer.Talk(), trust=Trust(digest))
    assert not (tmp_path / "out").exists()
    assert installer.main([str(signed), "--sha256", "0" * 64]) == 1
    assert installer.main([str(signed), "--trust", str(REAL / "sealed.pub")]) == 1


@pytest.mark.parametrize("option", ["--sha256", "--trust"])
def test_what_is_asked_for_with_an_empty_text_is_refused(
    option: str, signed: Path, tmp_path: Path
) -> None:
    """A shell makes it of a variable that is not set; it must not be as if nothing was asked."""
    out = tmp_path / "out"
    trust = Trust(**{"key" if option == "--trust" else "sha256": ""})
    with pytest.raises(UsageError, match=r"is empty|is not a SHA-256"):
        installer.install(signed, out, installer.Talk(), trust=trust)
    assert installer.main([str(signed), "-o", str(out), option, ""]) == 2
    result = CliRunner().invoke(app, ["install", str(signed), "-o", str(out), option, ""])
    assert isinstance(result.exception, UsageError)
    assert not out.exists()


@pytest.mark.parametrize("name", ["a\nb.tar", os.fsdecode(b"\xff.tar")])
def test_a_file_of_any_name_is_signed(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"x")
    sign(path, read_secret_key(REAL / "plain.key"))
    verify(path, read_public_key(str(REAL / "plain.pub")))


def test_line_ends_of_windows_are_taken_as_the_real_tool_takes_them(signed: Path) -> None:
    beside = signed.with_name(signed.name + ".minisig")
    beside.write_bytes(beside.read_bytes().replace(b"\n", b"\r\n"))
    verify(signed, read_public_key(str(REAL / "plain.pub")))


def test_without_cryptography_a_signature_is_refused_not_passed_over(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="cannot be checked here") as caught:
        installer.install(
            signed, tmp_path / "out", installer.Talk(), trust=Trust(key=str(REAL / "plain.pub"))
        )
    assert "--sha256" in caught.value.hint


def test_gate_takes_reports_that_the_trusted_key_signed(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(report_json(make_report().as_json()), encoding="utf-8")
    sign(report, read_secret_key(REAL / "plain.key"))

    def gate(key: str) -> Any:
        arguments = ["gate", str(report), "--max-size", "0.9", "--trust", str(REAL / key)]
        return CliRunner().invoke(app, arguments)

    assert gate("plain.pub").exit_code == 0
    assert isinstance(gate("sealed.pub").exception, SignatureError)
    report.write_text(report.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert isinstance(gate("plain.pub").exception, SignatureError)
