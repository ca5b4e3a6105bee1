"""constraints.txt has an exact version, within pyproject.toml's bounds, of everything that ``make`` installs."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LINES = [
    line
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line[:1] != "#"
]
PINS = {pin.name: pin for pin in map(Requirement, LINES)}


def requirements() -> dict[str, Requirement]:
    """What pyproject.toml asks for, in the extras that the Makefile installs, by normal name."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["torch"], *extras["rtx"], *extras["dev"]]
    return {wanted.name.lower().replace("_", "-"): wanted for wanted in map(Requirement, lines)}


def test_every_requirement_has_a_version_within_its_bounds() -> None:
    for name, wanted in requirements().items():
        if name != "torch":
            (pin,) = PINS[name].specifier
            assert pin.operator == "==", name
            assert wanted.specifier.contains(pin.version), name


def test_pins_name_no_place_and_no_pytorch() -> None:
    assert "torch" not in PINS
    assert len(PINS) == len(LINES)
    assert not any(pin.url or "/" in str(pin) or "+" in str(pin) for pin in PINS.values())


def test_every_lower_bound_is_tried_by_make_test_oldest() -> None:
    """A requirement without a lower bound would be installed at its newest."""
    unbounded = {name for name, wanted in requirements().items() if not wanted.specifier}
    assert unbounded <= {"types-pyyaml", "types-psutil"}
