"""Makes names of data, models, files and runs, which may contain anything, safe to print.

For the terminal, Markdown and HTML; figures draw `plain` names without interpreting mathematics (`figures.STYLE`).
"""

from __future__ import annotations

import html
import re

WORD, NAME = 300, 60  # letters of a word in a sentence, and of a name in a table or a title, that are shown at most

# What begins or ends markup in Markdown, a cell of a table or a formula; an underscore between letters does not.
MARKDOWN = re.compile(r"[\\`*\[\]<>|$~#&]|(?<![^\W_])_|_(?![^\W_])")


def plain(text: str) -> str:
    """The text with control, direction and other invisible characters, which a terminal obeys, as their numbers."""
    return "".join(letter if letter.isprintable() or letter == "\n" else _number(letter) for letter in text)


def sentence(text: str) -> str:
    """The text as one line with long words shortened."""
    return plain(" ".join(short(word, longest=WORD) for word in text.split()))


def short(name: str, *, longest: int = NAME) -> str:
    """The name, or its beginning and end if it is long."""
    head = longest * 2 // 3
    return name if len(name) <= longest else f"{name[:head]}…{name[head + 1 - longest :]}"


def markdown(name: str) -> str:
    """The name escaped for Markdown: for a paragraph, a heading or a table cell."""
    return MARKDOWN.sub(lambda found: f"\\{found[0]}", sentence(name))


def page(name: str) -> str:
    """The name escaped for HTML, also in an attribute."""
    return html.escape(sentence(name))


def _number(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
