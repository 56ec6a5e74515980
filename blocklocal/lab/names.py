"""Names of data, models, files and runs, which may hold anything, as text that is harmless where it goes.

For the terminal, Markdown and HTML; figures draw `plain` names and read no mathematics in them (`figures.STYLE`).
"""

from __future__ import annotations

import html
import re

WORD, NAME = 300, 60  # letters of a word in a sentence, and of a name in a table or a title, that are shown at most

# What begins or ends markup in Markdown, a cell of a table or a formula; an underscore between letters does not.
MARKDOWN = re.compile(r"[\\`*\[\]<>|$~#&]|(?<![^\W_])_|_(?![^\W_])")


def plain(text: str) -> str:
    """Without what a terminal obeys: control, direction and other invisible characters are shown by their numbers."""
    return "".join(letter if letter.isprintable() or letter == "\n" else _number(letter) for letter in text)


def sentence(text: str) -> str:
    """One line, in which no word is endless."""
    return plain(" ".join(short(word, longest=WORD) for word in text.split()))


def short(name: str, *, longest: int = NAME) -> str:
    """The name, or its beginning and its end."""
    head = longest * 2 // 3
    return name if len(name) <= longest else f"{name[:head]}…{name[head + 1 - longest :]}"


def markdown(name: str) -> str:
    """As itself in a paragraph, a heading or a cell."""
    return MARKDOWN.sub(lambda found: f"\\{found[0]}", sentence(name))


def page(name: str) -> str:
    """As itself in HTML, in an attribute too."""
    return html.escape(sentence(name))


def _number(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
