"""The package file: equal parts give equal bytes, every altered byte is found and named, nothing leaves the folder."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from mpq_deploy.device.archive import (
    BLOCK,
    MANIFEST,
    SUMS,
    ArchiveError,
    extract,
    read_archive,
    write_archive,
)
from mpq_deploy.errors import UsageError

WEIGHTS = bytes(range(256)) * 5


def parts() -> dict[str, bytes]:
    others = {"model.onnx": b"graph", "weights.bin": WEIGHTS, "build.sh": b"#!/bin/sh\n"}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in others.items()}
    return {**others, MANIFEST: json.dumps({"parts": digests}).encode()}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    write_archive(tmp_path / "a.tar", parts())
    return tmp_path / "a.tar"


def part_at(archive: Path, position: int) -> str:
    """The name of the part whose header, content or padding holds the byte at ``position``; "" for the end."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            end = member.offset_data + member.size + -member.size % BLOCK
            if member.offset <= position < end:
                return member.name
    return ""


def test_equal_parts_give_equal_bytes_whatever_their_order_and_source(
    archive: Path, tmp_path: Path
) -> None:
    (tmp_path / "w").write_bytes(WEIGHTS)
    reordered = {**dict(reversed(parts().items())), "weights.bin": tmp_path / "w"}
    digest = write_archive(tmp_path / "b.tar", reordered)
    assert archive.read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert digest == hashlib.sha256(archive.read_bytes()).hexdigest()


def test_tar_itself_reads_it_and_sha256sum_agrees(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["tar", "xf", str(archive), "-C", str(out)], check=True)
    subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=out, check=True)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name != SUMS} == parts()
    assert (out / "build.sh").stat().st_mode & 0o111


def test_what_is_extracted_is_what_was_packed(archive: Path, tmp_path: Path) -> None:
    extract(archive, read_archive(archive), tmp_path / "out")
    assert {
        p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.name != SUMS
    } == parts()


def test_every_byte_counts_and_the_part_is_named(archive: Path, tmp_path: Path) -> None:
    """One bit of each byte in turn, headers and padding included (every 7th byte, to be quick)."""
    content = archive.read_bytes()
    broken = tmp_path / "broken.tar"
    for position in range(0, len(content), 7):
        altered = bytearray(content)
        altered[position] ^= 1 << (position % 8)
        broken.write_bytes(altered)
        with pytest.raises(ArchiveError) as caught:
            read_archive(broken)
        name = part_at(archive, position)
        if (
            name
            and "header after" not in caught.value.message
            and "which no package has" not in caught.value.message
        ):
            # An altered name shows as another part, or as one that is missing.
            named = f"'{name}'" in caught.value.message or position % BLOCK < 100
            assert named, (position, name, caught.value.message)


def test_an_archive_cut_short_anywhere_names_the_part(archive: Path, tmp_path: Path) -> None:
    content = archive.read_bytes()
    for length in range(1, len(content), 101):
        (tmp_path / "short.tar").write_bytes(content[:length])
        with pytest.raises(ArchiveError, match=r"truncated|altered"):
            read_archive(tmp_path / "short.tar")
    (tmp_path / "short.tar").write_bytes(content[: content.index(WEIGHTS) + 100])
    with pytest.raises(
        ArchiveError, match=r"truncated in the part 'weights.bin' \(100 of 1,280 bytes are there\)"
    ):
        read_archive(tmp_path / "short.tar")


def test_bytes_after_the_end_are_refused(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(ArchiveError, match="The end of"):
        read_archive(archive)


def hostile(member: tarfile.TarInfo, content: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def link(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("weights.bin")
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../escape"),
        tarfile.TarInfo("/tmp/escape"),
        tarfile.TarInfo("folder/escape"),
        tarfile.TarInfo(".hidden"),
        tarfile.TarInfo("a\nb"),
        link(tarfile.SYMTYPE),
        link(tarfile.LNKTYPE),
        link(tarfile.CHRTYPE),
        link(tarfile.DIRTYPE),
    ],
    ids=[
        "parent",
        "absolute",
        "folder",
        "hidden",
        "newline",
        "symlink",
        "hardlink",
        "device",
        "directory",
    ],
)
def test_no_path_link_or_device_gets_in(member: tarfile.TarInfo, tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(hostile(member))
    with pytest.raises(ArchiveError):
        read_archive(tmp_path / "bad.tar")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.tar"]


def test_a_link_that_lies_in_the_folder_is_not_followed(archive: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("keep", encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    (out / "weights.bin").symlink_to(victim)
    extract(archive, read_archive(archive), out)
    assert victim.read_text(encoding="utf-8") == "keep"
    assert (out / "weights.bin").read_bytes() == WEIGHTS


@pytest.mark.parametrize("content", [b"", b"hello", bytes(2048)])
def test_what_is_no_package_says_so(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ArchiveError) as caught:
        read_archive(tmp_path / "x.tar")
    assert caught.value.hint


@pytest.mark.parametrize("name", ["../x", "a//b", "/a", "a/../b", "a/b/c/d", "", ".x", "x" * 100])
def test_names_that_are_not_plain_are_not_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write_archive(tmp_path / "a.tar", {**parts(), name: b""})
    assert list(tmp_path.iterdir()) == []


def test_long_lists_and_many_parts_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.mpq.tar"
    write_archive(path, {MANIFEST: b"{}", **{f"p{number}": b"x" for number in range(130)}})
    with pytest.raises(ArchiveError, match="more parts than a package has"):
        read_archive(path)
    write_archive(path, {MANIFEST: b"x" * ((64 << 20) + 1)})
    with pytest.raises(ArchiveError, match=r"'manifest\.json' of 67,108,865 bytes"):
        read_archive(path)
