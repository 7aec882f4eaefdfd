"""What is written for users: where it is, its blocks, and where its links lead."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CHAPTERS = tuple(sorted(path for path in DOCS.glob("*.md") if path.name != "README.md"))
_PACKAGES = sorted(path for top in ("smc", "cluster", "bench", "e2e") for path in (ROOT / top).rglob("README.md"))
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")), *_PACKAGES)
"""Everything that links."""
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ON = re.compile(r"# on (\S+)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a document."""

    kind: str
    """The word behind the fence."""
    text: str
    line: int
    """Of the document, where it begins."""

    @property
    def commands(self) -> list[str]:
        """One a line, or several lines that end in a backslash; comments are none."""
        lines = self.text.replace("\\\n", "").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]

    @property
    def machine(self) -> str:
        """The address in `# on <address>`, its first line; "" is the one where the reader sits."""
        found = _ON.match(self.text)
        return found[1] if found else ""

    @property
    def file(self) -> str:
        """The name in the comment of its first line, under which a manifest is kept."""
        first, _, _ = self.text.partition("\n")
        return first.removeprefix("# ") if first.startswith("# ") else ""


def blocks(document: Path) -> list[Block]:
    """In their order."""
    text = document.read_text()
    return [Block(found[1], found[2], text.count("\n", 0, found.start()) + 1) for found in _BLOCK.finditer(text)]


def links(page: Path) -> list[str]:
    """Where its links lead, as they are written, but for those that leave the project."""
    text = _BLOCK.sub("", page.read_text())
    return [link for link in _LINK.findall(text) if not re.match(r"\w+:", link)]


def anchors(page: Path) -> set[str]:
    """What a link may name behind `#`: its headings, as a forge of git repositories writes them."""
    headings = _HEADING.findall(_BLOCK.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
