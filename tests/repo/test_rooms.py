"""Imports point down: import-linter holds the picture of docs/architecture.md, and would notice if it did not."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

LINT = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package below `folder`/src with the settings in `folder`/pyproject.toml."""
    environment = os.environ | {"PYTHONPATH": str(folder / "src")}
    return subprocess.run([sys.executable, "-c", LINT], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def copy_of_the_package(root: Path, folder: Path) -> Path:
    shutil.copytree(root / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.jsonl"))
    shutil.copy(root / "pyproject.toml", folder)
    return folder


def test_imports_point_down(root: Path) -> None:
    report = lint_imports(root)
    assert report.returncode == 0, report.stdout + report.stderr


def test_an_import_that_points_up_is_caught(root: Path, tmp_path: Path) -> None:
    folder = copy_of_the_package(root, tmp_path)
    (folder / "src/luthier/core/turncoat.py").write_text("import luthier.adapt\n")
    report = lint_imports(folder)
    assert report.returncode != 0
    assert "luthier.core.turncoat -> luthier.adapt" in report.stdout


def test_a_room_that_is_not_in_the_picture_is_caught(root: Path, tmp_path: Path) -> None:
    folder = copy_of_the_package(root, tmp_path)
    (folder / "src/luthier/utils").mkdir()
    (folder / "src/luthier/utils/__init__.py").write_text("")
    report = lint_imports(folder)
    assert report.returncode != 0
    assert "utils" in report.stdout


def test_the_architecture_page_describes_every_room(root: Path) -> None:
    page = (root / "docs/architecture.md").read_text()
    rooms = [entry for entry in (root / "src/luthier").iterdir() if (entry / "__init__.py").exists()]
    missing = [room.name for room in rooms if f"| `{room.name}` |" not in page]
    assert not missing, f"docs/architecture.md has no row for: {missing}"


def test_the_architecture_page_draws_the_order_that_is_checked(root: Path) -> None:
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    checked = [
        [room.strip(" ()") for room in line.split("|")] for line in settings["tool"]["importlinter"]["contracts"][0]["layers"]
    ]
    built = [[room for room in line if (root / "src/luthier" / room / "__init__.py").exists()] for line in checked]
    page = (root / "docs/architecture.md").read_text()
    picture = page.split("```rooms\n")[1].split("```")[0]
    drawn = [line.split("  ")[0].split(" | ") for line in picture.splitlines()]
    assert [set(line) for line in drawn] == [set(line) for line in built if line]
