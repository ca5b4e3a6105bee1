"""The documentation site: it builds without a broken link, has every command and key, and fetches nothing."""

from __future__ import annotations

import ast
import html
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer

from mpq_deploy.cli import app
from mpq_deploy.engine.target import known_targets
from mpq_deploy.recipe import Recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "calibration" / "README.md"])
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
TROUBLE = DOCS / "troubleshooting.md"
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("material") is None,
    reason='needs mkdocs-material: pip install "mpq-deploy[docs]"',
)


class Requests(HTMLParser):
    """What a browser fetches by itself to show a page: everything but the targets of <a>."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        fetched = [values.get(name) for name in ("src", "srcset", "poster", "data")]
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next", "author"):
            fetched.append(values.get("href"))
        self.found += [one for one in fetched if one]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(folder),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def keys(values: dict[str, object], path: str = "") -> list[str]:
    found: list[str] = []
    for name, value in values.items():
        inner = isinstance(value, dict) and path + name != "recover.losses"
        found += keys(value, f"{path}{name}.") if inner else [path + name]  # type: ignore[arg-type]
    return found


@needs_mkdocs
def test_every_command_has_a_page_with_every_option(site: Path) -> None:
    root = typer.main.get_command(app)
    for name in COMMANDS:
        text = html.unescape((site / "commands" / f"{name}.html").read_text(encoding="utf-8"))
        assert f"commands/{name}.html" in (site / "index.html").read_text(encoding="utf-8"), (
            "the navigation leads there"
        )
        options = [
            option for one in root.commands[name].params for option in one.opts if option[0] == "-"
        ]  # type: ignore[attr-defined]
        for option in options:
            assert re.search(rf"<code>[^<]*{option}\b", text), f"{name} {option}"


@needs_mkdocs
def test_every_recipe_key_stands_there_with_its_default(site: Path) -> None:
    text = (site / "recipe.html").read_text(encoding="utf-8")
    for key in keys(Recipe().model_dump(mode="json")):
        assert f'id="{key}"' in text, key
    row = next(
        line
        for line in re.findall(r"<tr>.*?</tr>", text, re.DOTALL)
        if 'id="calibrate.samples"' in line
    )
    assert all(
        word in row for word in ("integer", "at least 1", "<code>128</code>", "trajectories")
    )
    assert 'id="allocate.protect[].schemes"' in text
    described = re.findall(
        r'id="([^"]+)">[^<]*</code></td>\s*<td>.*?</td>\s*<td>.*?</td>\s*<td>(.*?)</td>', text
    )
    assert len(described) >= 80 and all(words for _, words in described), [
        key for key, words in described if not words
    ]


@needs_mkdocs
def test_every_target_stands_there(site: Path) -> None:
    text = (site / "every-target.html").read_text(encoding="utf-8")
    for name in known_targets():
        assert f'id="{name}"' in text


@needs_mkdocs
def test_inline_commands_and_keys_are_links_to_their_pages(site: Path) -> None:
    text = (site / "troubleshooting.html").read_text(encoding="utf-8")
    assert '<a href="commands/doctor.html"><code>mpq-deploy doctor</code></a>' in text
    assert '<a href="recipe.html#recover.rank"><code>recover.rank</code></a>' in text
    for target, anchor in set(re.findall(r'href="([\w/.-]*recipe\.html)#([\w.]+)"', text)):
        assert f'id="{anchor}"' in (site / target).read_text(encoding="utf-8")


@needs_mkdocs
def test_viewing_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(COMMANDS) + 20
    for page in pages:
        requests = Requests()
        requests.feed(page.read_text(encoding="utf-8"))
        assert any(one.endswith(".css") for one in requests.found)
        assert not [one for one in requests.found if "//" in one and not one.startswith("data:")], (
            page
        )
    for sheet in site.rglob("*.css"):
        assert not re.search(
            r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")
        ), sheet


@needs_mkdocs
def test_a_broken_link_would_fail_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# Page\n\n[there](nowhere.md)\n", encoding="utf-8")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    validation = settings[settings.index("validation:") : settings.index("# An entry")]
    (tmp_path / "mkdocs.yml").write_text(
        f"site_name: x\nstrict: true\n{validation}", encoding="utf-8"
    )
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode != 0 and "nowhere.md" in done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_work_on_a_code_host_too(document: Path) -> None:
    """Relative links of plain Markdown lead to files of the repository."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target) and not target.startswith("#"):
            assert (document.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_paths_that_a_document_names_are_there(document: Path) -> None:
    """Paths in code such as `tests/graph`; in CONTRIBUTING also those inside the package, such as `graph/save.py`."""
    folders = "tests|scripts|benchmarks|mpq_deploy|recipes|docker"
    text = document.read_text(encoding="utf-8")
    for path in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/.-]*\w", text):
        # The wheel has that folder, the repository keeps it as calibration/.
        assert (ROOT / path).exists() or path.startswith("mpq_deploy/calibration_data"), path
    if document.name == "CONTRIBUTING.md":
        rooms = "|".join(path.name for path in (ROOT / "mpq_deploy").iterdir() if path.is_dir())
        for path in re.findall(rf"`((?:{rooms})/[\w/.]*)`", text):
            assert (ROOT / "mpq_deploy" / path).exists(), path
        named = set(re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE))
        assert named == {path.parent.name for path in (ROOT / "mpq_deploy").glob("*/__init__.py")}


def messages() -> list[str]:
    """Every text in the package, with … for what is put into it."""
    found = []
    for path in (ROOT / "mpq_deploy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        one.value if isinstance(one, ast.Constant) else "…" for one in node.values
                    )
                )  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_troubleshooting_quotes_what_the_program_says() -> None:
    quoted = re.findall(r"^### `(.+)`$", TROUBLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quoted) > 25
    said = messages()
    for quote in quoted:
        parts = [re.escape(part) for part in quote.split("…")]
        pattern = re.compile("(?s:.*)".join(parts))
        assert any(pattern.search(one) for one in said if len(one) >= len(quote) / 2), quote
