"""NumPy's files and pictures from others: numbers within limits, or one line."""

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpq_deploy.errors import InputError
from mpq_deploy.system.array_file import read_array, read_arrays
from mpq_deploy.system.picture_file import read_picture

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b/c": np.asfortranarray(np.arange(6).reshape(3, 2)),
    "scalar": np.array(3.0),
    "empty": np.zeros((0, 4), np.float16),
    "text": np.array(["x", "yy"]),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_numpy_reads_them(save: object, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save(path, **ARRAYS)  # type: ignore[operator]
    read = read_arrays(path)
    with np.load(path) as expected:
        assert set(read) == set(expected.files)
        for name in expected.files:
            np.testing.assert_array_equal(read[name], expected[name])
            assert read[name].dtype == expected[name].dtype
            assert read[name].flags.writeable
    assert list(read_arrays(path, ("a",))) == ["a"]
    with pytest.raises(InputError, match="no array 'z'"):
        read_arrays(path, ("z",))
    np.save(tmp_path / "a.npy", ARRAYS["b/c"])
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy"), ARRAYS["b/c"])


def _npy(shape: str, data: bytes) -> bytes:
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


def _zip(path: Path, *members: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def test_files_that_ask_for_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    bomb = _zip(tmp_path / "bomb.npz", ("a.npy", _npy("(50000000,)", bytes(200_000_000))))
    with pytest.raises(InputError, match="unpacks to 200 MB"):
        read_arrays(bomb)
    lie = _zip(tmp_path / "lie.npz", ("a.npy", _npy("(1000000000000,)", bytes(8))))
    with pytest.raises(InputError, match="but 8 bytes of data"):
        read_arrays(lie)
    (tmp_path / "lie.npy").write_bytes(_npy("(-1, -2)", bytes(8)))
    with pytest.raises(InputError, match="shape"):
        read_array(tmp_path / "lie.npy")


def test_python_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="Python objects"):
        read_array(tmp_path / "o.npy")


def test_any_cut_or_altered_byte_is_read_or_refused(tmp_path: Path) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, a=np.arange(8.0), b=np.zeros(3, np.int8))
    whole, path = content.getvalue(), tmp_path / "x.npz"
    for end in range(0, len(whole), 3):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError):
            read_arrays(path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_arrays(path)
        except InputError as error:
            assert "\n" not in str(error)


def test_pictures_are_decoded_after_their_size_was_looked_at(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    picture = Image.fromarray(noise)
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "a.png")), np.asarray(picture))
    with pytest.raises(InputError, match="64 x 64 pixels, more than 4,095"):
        read_picture(tmp_path / "a.png", pixels=4095)
    (tmp_path / "big.png").write_bytes(_png(30_000, 30_000))
    with pytest.raises(InputError, match="more than 64,000,000"):
        read_picture(tmp_path / "big.png")
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(InputError, match="is not an image"):
        read_picture(tmp_path / "text.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be decoded"):
        read_picture(tmp_path / "cut.png")


def _png(width: int, height: int) -> bytes:
    """The head of a picture of so many pixels, without its data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99)))
