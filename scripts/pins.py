"""Print the versions that ``make`` installs by, as a constraints file for pip.

    python scripts/pins.py             what the environment of this Python holds (``make lock``)
    python scripts/pins.py --oldest    the lowest versions that pyproject.toml names (``make test-oldest``)

PyTorch is left out: the Makefile pins it, and its builds differ by machine.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

LEFT_OUT = {"mpq-deploy", "torch", "pip", "setuptools", "wheel"}
EXTRAS = ("torch", "rtx", "dev")
REQUIREMENT = re.compile(r"([\w.-]+)>=([\w.]+)")


def main() -> None:
    """Print one line per package."""
    pins = oldest_pins() if "--oldest" in sys.argv[1:] else installed_pins()
    print(
        "# Made by scripts/pins.py. Older Pythons take the newest versions that pyproject.toml allows."
    )
    print("\n".join(sorted(pins)))


def installed_pins() -> list[str]:
    """Return ``name==version`` of every package here, without builds (+cpu), for this Python and newer ones.

    Older Pythons, which many of these versions no longer run on, take the newest that pyproject.toml allows.
    """
    pins, here = [], f"{sys.version_info.major}.{sys.version_info.minor}"
    for package in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()
        if name in LEFT_OUT or re.match(r"nvidia-|triton$", name):
            continue
        pin = f"{name}=={package.version.split('+')[0]}"
        needed = re.search(r">=\s*(3[.\d]+)", package.metadata.get("Requires-Python") or "")
        python = max(needed[1] if needed else here, here, key=_number)
        pins.append(f'{pin} ; python_full_version >= "{python}"')
    return pins


def oldest_pins() -> list[str]:
    """Return the lower bounds of pyproject.toml as exact versions. Needs Python 3.11."""
    import tomllib

    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    names = [
        *project["dependencies"],
        *(name for extra in EXTRAS for name in project["optional-dependencies"][extra]),
    ]
    bounds = {match[1]: match[2] for name in names if (match := REQUIREMENT.match(name))}
    return [f"{name}=={version}" for name, version in bounds.items()]


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


if __name__ == "__main__":
    main()
