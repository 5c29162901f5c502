"""Every command, option and setting is described, and the reference pages say what the program says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import typer
from pydantic import Field

from luthier.core.methods import CATALOGUE
from luthier.core.settings import Settings


@pytest.fixture(scope="module")
def pages(root: Path) -> ModuleType:
    """Return the script that writes the pages, loaded as a module."""
    spec = importlib.util.spec_from_file_location("make_reference_pages", root / "scripts/make_reference_pages.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def luthier_app() -> typer.Typer:
    from luthier.cli.app import app

    return app


def undescribed(pages: ModuleType, app: typer.Typer) -> list[str]:
    faults = []
    for path, command, context in pages.walk_commands(app, "luthier"):
        if not command.help:
            faults.append(path)
        for parameter in command.get_params(context):
            described = getattr(parameter, "help", "") or parameter.name == "help"
            if not described and not getattr(parameter, "hidden", False):
                faults.append(f"{path} {parameter.name}")
    return faults


def test_every_command_and_option_is_described(pages: ModuleType, luthier_app: typer.Typer) -> None:
    assert not undescribed(pages, luthier_app)


def test_the_commands_page_is_current(pages: ModuleType, luthier_app: typer.Typer, root: Path) -> None:
    assert (root / "docs/commands.md").read_text() == pages.commands_page(luthier_app), "run: make docs"


def test_every_setting_is_described(pages: ModuleType) -> None:
    models = pages.settings_models()
    assert "LoraConfig" in [model.__name__ for model in models]
    bare = [f"{model.__name__}.{name}" for model in models for name, field in model.model_fields.items() if not field.description]
    assert not bare


def test_the_settings_page_is_current(pages: ModuleType, root: Path) -> None:
    assert (root / "docs/settings.md").read_text() == pages.settings_page(pages.settings_models()), "run: make docs"


def test_the_methods_page_is_current(pages: ModuleType, root: Path) -> None:
    assert (root / "docs/methods.md").read_text() == pages.methods_page(CATALOGUE), "run: make docs"


def test_the_walk_reaches_nested_commands_and_their_parameters(pages: ModuleType) -> None:
    app, below = typer.Typer(help="The root."), typer.Typer(help="A group.")
    app.add_typer(below, name="below")

    @app.command()
    def plain(where: str = typer.Option("here", help="the place | the spot")) -> None:
        """Do it."""

    @below.command()
    def deep(what: str, secretly: bool = typer.Option(False, hidden=True)) -> None:
        """Do it deeper."""

    @below.command(hidden=True)
    def unseen() -> None: ...

    page = pages.commands_page(app, "prog")
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## `prog`",
        "## `prog plain`",
        "## `prog below`",
        "## `prog below deep`",
    ]
    assert "the place \\| the spot" in page
    assert "here" in page
    assert "secretly" not in page
    assert undescribed(pages, app) == ["luthier below deep what"]


def test_a_settings_table_shows_default_and_meaning(pages: ModuleType) -> None:
    class _Example(Settings):
        """What it is."""

        needed: int = Field(description="must be given")
        steps: int = Field(7, description="how many")

    page = pages.settings_page([_Example])
    assert "| `needed` | required | must be given |" in page
    assert "| `steps` | `7` | how many |" in page
