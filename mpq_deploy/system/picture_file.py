"""Images from users: decoded only after their size was checked."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from mpq_deploy.errors import InputError, MpqError
from mpq_deploy.system.inputs import open_input
from mpq_deploy.system.names import printable

# 64 million pixels take 200 MB as RGB (our choice): a PNG of ten kilobytes can hold more.
PIXELS = 64_000_000
# Pillow's other formats (PostScript, PDF, fonts) start programs or are rarely read.
# Pillow's modes with transparency.
ALPHA = ("RGBA", "LA", "PA")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def read_picture(
    path: Path,
    *,
    mode: str = "RGB",
    opaque: bool = False,
    pixels: int = PIXELS,
    error: type[MpqError] = InputError,
    hint: str = "",
) -> Image.Image:
    """Return a picture's first frame in Pillow's ``mode``; ``opaque`` refuses transparency.

    Raises ``error`` for a file that is not a picture of ``FORMATS``, is damaged, or has more than
    ``pixels`` pixels.
    """
    shown = printable(str(path))
    with open_input(path, error=error, hint=hint) as file, warnings.catch_warnings():
        # Pillow warns above 89 million pixels; our own limit speaks first.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(file, formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > pixels:
                    what = f"{shown} has {width:,} x {height:,} pixels, more than {pixels:,}."
                    raise error(what, hint or "Make it smaller.")
                if opaque and (picture.mode in ALPHA or "transparency" in picture.info):
                    what = f"{shown} has transparency."
                    raise error(what, "Flatten it onto a background first.")
                decoded: Image.Image = picture.convert(mode)
                return decoded
        except MpqError:
            raise
        except Image.DecompressionBombError as problem:
            what = f"{shown} has more than {pixels:,} pixels."
            raise error(what, hint or "Make it smaller.") from problem
        except UnidentifiedImageError as problem:
            raise error(f"{shown} is not an image ({', '.join(FORMATS)}).", hint) from problem
        except Exception as problem:
            # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError and
            # more for damaged files.
            text = printable(" ".join(str(problem).split())[:200])
            raise error(f"{shown} cannot be decoded: {text}.", hint) from problem
