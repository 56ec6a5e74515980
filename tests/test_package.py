"""What `pip install` gets: a wheel with types and without tests, and a source archive that makes the same wheel."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
pytestmark = pytest.mark.slow


def run(*command: str, folder: Path, **environment: str) -> str:
    """Standard output, with nothing of this process's Python path."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(command, cwd=folder, env=clean | environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def build(source: Path, target: Path, *kinds: str) -> dict[str, Path]:
    pytest.importorskip("hatchling", reason="hatchling, which builds the package, comes with the extra dev")
    flags = [flag for kind in kinds for flag in ("-t", kind)]
    run(sys.executable, "-m", "hatchling", "build", *flags, "-d", str(target), folder=source)
    return {"wheel": next(target.glob("*.whl"), target), "sdist": next(target.glob("*.tar.gz"), target)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(ROOT, tmp_path_factory.mktemp("dist"), "wheel", "sdist")


def files(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_the_package_alone(built: dict[str, Path]) -> None:
    names = files(built["wheel"])
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "blocklocal").rglob("*.py")}
    assert sources <= names
    assert "blocklocal/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"blocklocal", f"blocklocal-{VERSION}.dist-info"}


def test_the_source_archive_makes_the_same_wheel(built: dict[str, Path], tmp_path: Path) -> None:
    with tarfile.open(built["sdist"]) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build(tmp_path / f"blocklocal-{VERSION}", tmp_path / "dist", "wheel")
    assert files(again["wheel"]) == files(built["wheel"])


def test_the_wheel_works_in_an_empty_environment(built: dict[str, Path], tmp_path: Path) -> None:
    """Nothing is fetched: of what it needs, torch is lent by the environment of the tests."""
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env"), folder=tmp_path)
    python = str(tmp_path / "env/bin/python")
    options = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, *options, str(built["wheel"]), folder=tmp_path)
    code = (
        "import blocklocal, importlib.metadata as m; "
        "from blocklocal.pipeline import Pipeline; "
        "print(blocklocal.__file__, m.version('blocklocal'), blocklocal.BlockLocal.__name__)"
    )
    lent = str(Path(torch.__file__).parents[1])
    code = f"import sys; sys.path.append({lent!r}); " + code
    path, version, name = run(python, "-c", code, folder=tmp_path).split()
    assert Path(path).is_relative_to(tmp_path)
    assert (version, name) == (VERSION, "BlockLocal")


def test_the_same_version_everywhere() -> None:
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {VERSION}\n" in (ROOT / "CHANGELOG.md").read_text()
