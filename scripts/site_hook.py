"""Hook of mkdocs (see mkdocs.yml): adds the pages made from the code, and makes the repository's links work there.

Documents are written for a code host: links are relative files, some of them outside docs/. Here these become links of
the site; a link to a file that is not part of it is a warning, which ``mkdocs build --strict`` fails on.
"""

from __future__ import annotations

import logging
import posixpath
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url
from pymdownx.slugs import slugify
from site_pages import (
    COMMANDS_FOLDER,
    DOCS,
    RECIPE_PAGE,
    ROOT,
    ROOT_PAGES,
    commands,
    generated_pages,
    recipe_keys,
)

LINK = re.compile(r"(?<=\]\()(?P<file>[^)#\s:]+)(?P<anchor>#[^)]*)?(?=\))")
# What must not be linked within (code blocks, links, headings), or a piece of inline code.
CODE = re.compile(
    r"<(?P<skip>pre|a|h1|h2|h3|h4)\b.*?</(?P=skip)>|<code>(?P<text>[^<]+)</code>", re.DOTALL
)
log = logging.getLogger("mkdocs.hooks.site")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors as code hosts make them; ``FOLDER/*`` in the navigation becomes the pages that are there."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    named = set(_named(config.nav))
    config.nav = _expanded(config.nav, named)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code, and those beside docs/."""
    for place, text in generated_pages().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files outside docs/, or from a page that lies there, into links of the site."""
    place = page.file.src_uri
    source = next((s for s, p in ROOT_PAGES.items() if p == place), f"docs/{place}")

    def replaced(found: re.Match[str]) -> str:
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), found["file"]))
        there = ROOT_PAGES.get(wanted) or (
            wanted.removeprefix("docs/") if wanted.startswith("docs/") else None
        )
        if there is None and (ROOT / wanted).exists():
            log.warning("%s links to %s, which is not part of the site.", source, wanted)
        if there is None:
            return found[0]
        return posixpath.relpath(there, posixpath.dirname(place) or ".") + (found["anchor"] or "")

    return LINK.sub(replaced, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link inline code that is a command (`mpq-deploy gate ...`) or a recipe key to its page."""
    known = set(commands())
    keys = {key for key in recipe_keys() if "." in key}
    here = page.file

    def linked(found: re.Match[str]) -> str:
        text = found["text"]
        if text is None:
            return found[0]
        words = text.split()
        if len(words) > 1 and words[0] == "mpq-deploy" and words[1] in known:
            place, anchor = f"{COMMANDS_FOLDER}/{words[1]}.md", ""
        elif (key := text.split(":")[0].split("=")[0]) in keys:
            place, anchor = RECIPE_PAGE, f"#{key}"
        else:
            return found[0]
        target = files.get_file_from_path(place)
        if target is None or target is here:
            return found[0]
        return f'<a href="{get_relative_url(target.url, here.url)}{anchor}">{found[0]}</a>'

    return CODE.sub(linked, html)


def _expanded(nav: Any, named: set[str]) -> Any:
    """Replace entries ``commands/*`` and ``*`` by the pages of that folder which the navigation does not name."""
    if isinstance(nav, list):
        return [
            one
            for entry in nav
            for one in (_matching(entry, named) if _is_glob(entry) else [_expanded(entry, named)])
        ]
    return (
        {title: _expanded(inner, named) for title, inner in nav.items()}
        if isinstance(nav, dict)
        else nav
    )


def _matching(pattern: str, named: set[str]) -> list[Any]:
    folder = pattern.removesuffix("*").rstrip("/")
    if folder == COMMANDS_FOLDER:
        return [{name: f"{folder}/{name}.md"} for name in commands()]
    found = sorted(path.relative_to(DOCS).as_posix() for path in (DOCS / folder).glob("*.md"))
    return [place for place in found if place not in named]


def _is_glob(entry: Any) -> bool:
    return isinstance(entry, str) and entry.endswith("*")


def _named(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [name for one in inner for name in _named(one)]
