"""An HTML page as a browser would read it."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Loaded resources, table rows and text of a page; fails when tags are not closed in order."""

    VOID = {"meta", "input"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.rows: dict[str, list[str]] = {}
        self.row: list[str] | None = None
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [
            value or "" for name, value in attrs if name in ("href", "src", "srcset", "action", "data")
        ]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.row = []
        if tag in ("td", "th"):
            self.row.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "tr":
            self.rows[self.row[0]] = self.row[1:]
            self.row = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.row:
            self.row[-1] += data
