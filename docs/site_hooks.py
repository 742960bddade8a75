"""What mkdocs does for this site beside its own: pages from files outside docs/, links to them, nothing from elsewhere.

README.md, CONTRIBUTING.md, SECURITY.md and LICENSE stand at the root, where forges look for them. On the site README.md is the
front page, the others are pages, and links to any of them lead there. mkdocs calls these functions by their names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # path from the root -> path on the site
    f"{source}.md": f"{page}.md"
    for source, page in {"README": "index", "CONTRIBUTING": "contributing", "SECURITY": "reporting"}.items()
} | {"LICENSE": "license.txt"}
_ITEM = re.compile(r"([-*]|\d+\.) ")
_ROW = re.compile(r"\|")
_LINK = re.compile(r"(\]\()([^)\s#]+)")
_LOADS = re.compile(  # what a browser fetches by itself, from another host
    r"""<(?:script|img|iframe|source|video|audio|link(?![^>]*rel="?canonical))\b[^>]*?\s(?:src|href)=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|@import\s*["'(]+(?:https?:)?//[^"')]+|url\(\s*["']?(?:https?:)?//[^"')]+""",
    re.IGNORECASE,
)
_FETCHED = (
    "https://unpkg.com/"  # the theme's script: of diagrams that no page has, and for browsers without ResizeObserver
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from the root."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links to files at the root lead to their pages, and let lists begin where they do for forges."""
    return site_links(separate_blocks(markdown))


def separate_blocks(markdown: str) -> str:
    """Return the text with an empty line before every list and table. Forges do without it, mkdocs' parser does not."""
    lines: list[str] = []
    fenced = False
    for line in markdown.splitlines():
        before = lines[-1] if lines else ""
        begins = [kind for kind in (_ITEM, _ROW) if kind.match(line) and not kind.match(before)]
        if begins and not fenced and before.strip() and not before.startswith((" ", "#")) and not _ITEM.match(before):
            lines.append("")
        lines.append(line)
        fenced ^= line.lstrip().startswith("```")
    return "\n".join(lines) + "\n"


def site_links(markdown: str) -> str:
    """Return the text with links as they are on the site, whose root is docs/, and which has PAGES."""

    def on_site(match: re.Match[str]) -> str:
        target = match[2].removeprefix("../").removeprefix("docs/")
        return match[1] + PAGES.get(target, target if match[2].startswith("docs/") else match[2])

    return _LINK.sub(on_site, markdown)


def on_post_build(config: Any) -> None:
    """Take out the addresses from which the theme's script would fetch others, and refuse pages that load from elsewhere."""
    site = Path(config.site_dir)
    for script in site.rglob("*.js"):
        text = script.read_text(encoding="utf-8")
        if _FETCHED in text:
            script.write_text(text.replace(_FETCHED, "about:blank#"), encoding="utf-8")
    for page in (*site.rglob("*.html"), *site.rglob("*.css")):
        if found := _LOADS.search(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page.relative_to(site)} loads something from elsewhere: {found[0][:200]}")
