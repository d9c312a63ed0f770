"""The wheel is complete: it is built, installed outside the checkout, and used there."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.tiny_models import save_llama

import todi_offline

CHECKOUT = Path(__file__).parent.parent
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")

DEMO = """
import sys
from pathlib import Path
from todi_offline.commands import demo
assert Path(demo.__file__).is_relative_to(sys.argv[1]), demo.__file__
demo.fetch_teacher = lambda: sys.argv[2]
demo.NUM_TRAIN, demo.NUM_HELDOUT, demo.NUM_LAYERS = 24, 6, 2
demo.demo(Path("out"))
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for setuptools leaves a folder `build` beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("todi_offline", "cache_tools"):
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    subprocess.run(
        [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def library(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is installed into."""
    folder = tmp_path_factory.mktemp("library")
    subprocess.run([*PIP, "install", "--no-deps", "--target", folder, wheel], check=True, capture_output=True)
    return folder


def run(library: Path, folder: Path, *args: str | Path) -> str:
    """Run Python in a folder, with the installed wheel in place of the checkout."""
    environment = os.environ | {"PYTHONPATH": str(library), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, *args], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_is_of_this_version_and_holds_no_tests(wheel: Path) -> None:
    assert wheel.name == f"todi_offline-{todi_offline.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "todi_offline",
        "cache_tools",
        f"todi_offline-{todi_offline.__version__}.dist-info",
    }
    pages = {name.rpartition("/")[2] for name in names if name.startswith("todi_offline/pages/")}
    assert {path.name for path in (CHECKOUT / "todi_offline" / "pages").iterdir() if path.is_file()} == pages


def test_the_installed_commands_print_their_version_and_their_help(library: Path, tmp_path: Path) -> None:
    assert todi_offline.__version__ in run(library, tmp_path, "-m", "todi_offline", "--version")
    assert "todi capture" in run(library, tmp_path, "-m", "todi_offline", "--help")
    assert "Usage" in run(library, tmp_path, "-m", "cache_tools", "--help")


def test_the_demo_runs_outside_of_the_checkout(library: Path, tmp_path: Path) -> None:
    teacher = save_llama(tmp_path / "teacher", num_hidden_layers=4)
    run(library, tmp_path, "-c", DEMO, library, teacher)
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "Content-Security-Policy" in page
    assert "<script>" in page
    run(library, tmp_path, "-m", "cache_tools", "view", "out/cache", "--out", "cache.html")
    assert (tmp_path / "cache.html").stat().st_size > 10_000
