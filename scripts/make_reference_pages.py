"""Write docs/commands.md, docs/settings.md and docs/methods.md from the program itself: make docs.

Every command of the command line and every settings model is walked, none is listed here by hand. A test fails when a page
differs from what this script would write, or when anything on it lacks a description. It never runs a command.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTICE = "<!-- Generated from the program by `make docs`; edit the program, not this page. -->"


# --- commands ------------------------------------------------------------------------------------------------


def walk_commands(app: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield (full name, command, context) for a typer app's root and every visible command below it, in order."""
    import typer

    def walk(command: Any, context: Any) -> Iterator[tuple[str, Any, Any]]:
        yield context.command_path, command, context
        if hasattr(command, "list_commands"):
            for child_name in command.list_commands(context):
                child = command.get_command(context, child_name)
                if not child.hidden:
                    yield from walk(child, typer.Context(child, info_name=child_name, parent=context))

    root = typer.main.get_command(app)
    return walk(root, typer.Context(root, info_name=name))


def parameters(command: Any, context: Any) -> list[tuple[str, str]]:
    """Return (how it is written, what it means) for each visible argument and option but --help and shell completion."""
    unremarkable = {"help", "install_completion", "show_completion"}
    shown = [one for one in command.get_params(context) if one.name not in unremarkable and not getattr(one, "hidden", False)]
    return [one.get_help_record(context) or (one.name, "") for one in shown]


def commands_page(app: Any, name: str = "luthier") -> str:
    """Return the page of all commands: a heading, the help text and a table of parameters for each."""
    parts = ["# Commands", NOTICE]
    for path, command, context in walk_commands(app, name):
        parts.append(f"## `{path}`")
        parts.append(inspect.cleandoc(command.help or ""))
        rows = parameters(command, context)
        if rows:
            parts.append(table(("argument or option", "meaning"), [(f"`{written}`", meaning) for written, meaning in rows]))
    return "\n\n".join(part for part in parts if part) + "\n"


# --- settings ------------------------------------------------------------------------------------------------


def settings_models() -> list[type]:
    """Return every public subclass of luthier's Settings, wherever in the package it is defined, by name."""
    import luthier
    from luthier.core.settings import Settings

    for module in pkgutil.walk_packages(luthier.__path__, "luthier."):
        if ".migrations." not in module.name:  # Alembic runs those, nobody imports them
            importlib.import_module(module.name)

    def below(model: type) -> Iterator[type]:
        child: type
        for child in model.__subclasses__():
            yield child
            yield from below(child)

    mine = {model for model in below(Settings) if model.__module__.startswith("luthier.") and not model.__name__.startswith("_")}
    return sorted(mine, key=lambda model: model.__name__)


def default_of(field: Any) -> str:
    """Return a field's default as it would be written, or what stands for it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    name = type(value).__name__
    return f"[`{name}`](#{name.lower()})" if hasattr(value, "model_fields_set") else f"`{value!r}`"


def settings_page(models: list[Any]) -> str:
    """Return the page of all settings: a heading, the docstring and a table of fields for each model."""
    parts = ["# Settings", NOTICE]
    for model in models:
        parts.append(f"## `{model.__name__}`")
        parts.append(inspect.cleandoc(model.__doc__ or ""))
        fields = model.model_fields.items()
        rows = [(f"`{name}`", default_of(field), field.description or "") for name, field in fields]
        parts.append(table(("setting", "default", "meaning"), rows))
    return "\n\n".join(part for part in parts if part) + "\n"


# --- methods -------------------------------------------------------------------------------------------------


def methods_page(methods: Sequence[Any]) -> str:
    """Return the page of all methods and inits: what each does, when to use it, and how to ask for it."""
    parts = ["# Methods", NOTICE, "The same list in the terminal: `luthier methods`."]
    for kind, title in (("method", "Ways to adapt"), ("init", "Ways to begin")):
        parts.append(f"## {title}")
        for one in (one for one in methods if one.kind == kind):
            settings = ", ".join(
                f"`{section}.{key} = {value!r}`" for section, keys in one.settings.items() for key, value in keys.items()
            )
            parts.append(f"### `{one.name}`")
            parts.append(f"{one.what}\n\nWhen: {one.when}")
            parts.append(
                f"Ask for it with `{one.flag}`" + (f", which sets {settings}" if settings else "") + f". Source: {one.source}."
            )
    return "\n\n".join(parts) + "\n"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a Markdown table; a bar inside a cell is escaped and a line break becomes a space."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    """Write the pages."""
    from luthier.cli.app import app
    from luthier.core.methods import CATALOGUE

    pages = {"commands": commands_page(app), "settings": settings_page(settings_models()), "methods": methods_page(CATALOGUE)}
    for name, text in ((f"{name}.md", text) for name, text in pages.items()):
        (DOCS / name).write_text(text, encoding="utf-8")
        print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
