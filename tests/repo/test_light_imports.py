"""Starting the program is cheap: no torch, no transformers and no data library until a command needs them."""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import luthier
from luthier.core.threads import SPINS

HEAVY = ("torch", "transformers", "datasets", "pyarrow", "pandas", "matplotlib", "peft")
ROOMS = [f"luthier.{room.name}" for room in pkgutil.iter_modules(luthier.__path__) if room.ispkg]


def heavy_modules_after(statement: str, root: Path) -> list[str]:
    """Run a statement in a fresh interpreter and return which heavy libraries it has loaded."""
    script = f"import sys\n{statement}\nprint('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(root / "src")}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.rsplit("loaded:", 1)[1].split()


def test_the_check_sees_a_heavy_import(root: Path) -> None:
    assert "torch" in heavy_modules_after("import torch", root)


def test_importing_all_rooms_loads_nothing_heavy(root: Path) -> None:
    assert heavy_modules_after(f"import {', '.join(['luthier', *ROOMS])}", root) == []


def test_help_loads_nothing_heavy(root: Path) -> None:
    statement = (
        "from luthier.cli.app import main\n"
        "sys.argv = ['luthier', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )
    assert heavy_modules_after(statement, root) == []


@pytest.mark.parametrize("package", ["luthier", *ROOMS])
def test_every_public_name_exists(package: str) -> None:
    module = importlib.import_module(package)
    missing = [name for name in getattr(module, "__all__", []) if not hasattr(module, name)]
    assert not missing, f"{package}.__all__ lists names that cannot be imported: {missing}"


def test_the_package_has_public_names() -> None:
    assert luthier.__all__


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = luthier.no_such_name


def test_threads_of_the_command_line_wait_without_spinning() -> None:
    # OpenMP reads the word when torch is loaded, so it must be there before, and the user's own word must stand.
    script = (
        "import os, sys; from luthier.cli.app import main; sys.argv = ['luthier', '--version']\n"
        "try: main()\n"
        "except SystemExit: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    for given, expected in ((None, "PASSIVE False"), ("ACTIVE", "ACTIVE False")):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        environment |= {"OMP_WAIT_POLICY": given} if given else {}
        run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.splitlines()[-1] == expected


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_threads_of_an_engine_spin_for_a_moment(command: str) -> None:
    # Asleep they cost the engine a third of its speed on quiet cores, and spinning for long most of it on busy ones.
    script = (
        f"import os, sys; from luthier.cli.app import main; sys.argv = ['luthier', '{command}', '--help']\n"
        "try: main()\n"
        "except SystemExit: print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    )
    bare = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for given, expected in (
        ({}, f"None {SPINS}"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "PASSIVE None"),
        ({"GOMP_SPINCOUNT": "7"}, "None 7"),
    ):
        run = subprocess.run([sys.executable, "-c", script], env=bare | given, capture_output=True, text=True, check=True)
        assert run.stdout.splitlines()[-1] == expected
