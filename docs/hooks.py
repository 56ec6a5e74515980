"""What mkdocs does to these pages: those of the repository outside docs/ join them, and links lead to the same things
as on GitHub."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {  # file of the repository: page of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples": "examples.md",
}
COPIES = {"CITATION.cff": "CITATION.cff.txt", "LICENSE": "LICENSE.txt"}
LANGUAGES = {".py": "python", ".sh": "sh"}

CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in PAGES.items() | COPIES.items():
        path = ROOT / source
        content = examples(path) if path.is_dir() else path.read_text()
        files.append(File.generated(config, target, content=content))
    return files


def examples(folder: Path) -> str:
    """A page with all of them."""
    parts = ["# Examples\n\nWhole scripts; the tests run them.\n"]
    for file in sorted(folder.iterdir()):
        if file.suffix in LANGUAGES:
            parts.append(f"## {file.name}\n\n```{LANGUAGES[file.suffix]}\n{file.read_text().strip()}\n```\n")
    return "\n".join(parts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    origin = next((source for source, target in PAGES.items() if target == uri), f"docs/{uri}")

    def replaced(link: re.Match[str]) -> str:
        path, hash, anchor = link[2].partition("#")
        if not path or path.startswith(("http://", "https://")):
            return link[0]
        source = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        if source.startswith("examples/"):
            target, hash, anchor = "examples.md", "#", source.removeprefix("examples/").replace(".", "")
        elif source.startswith("docs/"):
            target = source.removeprefix("docs/")
        elif source in PAGES | COPIES:
            target = (PAGES | COPIES)[source]
        else:
            raise PluginError(f"{origin}: the link to {link[2]} leads to nothing of the site: see docs/hooks.py")
        return "](" + posixpath.relpath(target, posixpath.dirname(uri) or ".") + hash + anchor + ")"

    parts = CODE.split(markdown)
    return "".join(part if k % 2 else LINK.sub(replaced, part) for k, part in enumerate(parts))
