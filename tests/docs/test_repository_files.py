"""The files that a code host reads: licence, citation, and how to report a vulnerability."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
# Of https://www.apache.org/licenses/LICENSE-2.0.txt.
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def project(key: str) -> str:
    found = re.search(
        rf'^{key} = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert found is not None
    return found[1]


def test_the_licence_is_the_official_text() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2
    assert project("license") == "Apache-2.0"


def test_the_citation_is_valid_and_of_this_version() -> None:
    """What CFF 1.2.0 requires, and what it allows at the top."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    required = {"authors", "cff-version", "message", "title"}
    optional = {"abstract", "keywords", "license", "type", "version", "date-released", "doi", "url"}
    assert required <= citation.keys() <= required | optional
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert str(citation["version"]) == project("version") and citation["license"] == project(
        "license"
    )
    assert all(author["name"] for author in citation["authors"]) and all(
        map(str, citation["keywords"])
    )


def test_the_security_policy_says_how_to_report() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "## Reporting" in text and f"{project('version')} is not released" in text


def test_the_changelog_is_one_screen() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 65 and f"## {project('version')}" in text
