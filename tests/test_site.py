"""The site has every page and every public name. `make docs` builds it, and takes a broken link for an error."""

import re
from pathlib import Path

import pytest

import blocklocal as bll
from blocklocal import alignment, offload, pipeline

ROOT = Path(__file__).parent.parent
API = {"library": bll, "offload": offload, "pipeline": pipeline, "alignment": alignment}
ELSEWHERE = {"Pipeline", "alignment"}  # of blocklocal, with pages of their own
STORES = {"FileStore", "HostStore"}  # of blocklocal.offload, on the page of the library


@pytest.mark.parametrize("page", API)
def test_every_public_name_is_documented(page: str) -> None:
    documented = re.findall(r"^::: blocklocal\.(?:\w+\.)*(\w+)$", (ROOT / f"docs/api/{page}.md").read_text(), re.M)
    expected = set(API[page].__all__) - (ELSEWHERE if page == "library" else STORES if page == "offload" else set())
    assert set(documented) - {page} == expected


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs')}\n" in navigation + "\n", page.name
