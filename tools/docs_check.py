"""Checks the HTML from `make docs`: each link inside leads to a file and an anchor."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """A page's anchors and the addresses that it links to, loads or shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        self.targets += [values[name] for name in ("href", "src") if name in values]


def read(folder: Path) -> dict[Path, Page]:
    """All pages below a folder."""
    return {
        path.resolve(): Page(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.html"))
    }


def dead_links(pages: dict[Path, Page]) -> tuple[int, list[str]]:
    """The number of links inside, and those that lead nowhere."""
    count, dead = 0, []
    for path, page in pages.items():
        for target in page.targets:
            address = urlsplit(target)
            if address.scheme or address.netloc:
                continue
            count += 1
            file = (path.parent / unquote(address.path)).resolve() if address.path else path
            anchor = unquote(address.fragment)
            if not file.is_file():
                dead.append(f"{path.name}: no file {target}")
            elif anchor and file in pages and anchor not in pages[file].anchors:
                dead.append(f"{path.name}: no anchor {target}")
    return count, dead


def main() -> int:
    """Prints the counts and the dead links; 1 if there is one, or no page."""
    pages = read(Path(sys.argv[1]))
    count, dead = dead_links(pages)
    for line in dead:
        print(line)
    print(f"{len(pages)} pages, {count} links inside, {len(dead)} of them dead")
    return 1 if dead or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
