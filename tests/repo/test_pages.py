"""Pages that cannot lie: snippets are cut from examples that run, commands on a page exist, links lead somewhere."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATED = {"commands.md", "settings.md"}
PAGES = [page for page in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]) if page.name not in GENERATED]

FENCE = re.compile(r"(?P<lead>[^\n]*)\n```(?P<language>\w*)\n(?P<body>.*?)^```", re.DOTALL | re.MULTILINE)
ORIGIN = re.compile(r"<!-- from (examples/[\w./-]+\.py) -->")
LINK = re.compile(r"\[[^\]]*\]\((?!https?://|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])


def false_snippets(text: str, root: Path) -> list[str]:
    """Return what is wrong with a page's Python blocks: each must name an example that contains it word for word."""
    faults = []
    for fence in FENCE.finditer(text):
        origin = ORIGIN.search(fence["lead"])
        if origin and not (root / origin[1]).is_file():
            faults.append(f"{origin[1]} does not exist")
        elif origin and fence["body"] not in (root / origin[1]).read_text(encoding="utf-8"):
            faults.append(f"not in {origin[1]}:\n{fence['body']}")
        elif not origin and fence["language"] in {"python", "py"}:
            faults.append(f"a Python block without '<!-- from examples/NAME.py -->' above it:\n{fence['body']}")
    return faults


def command_lines(text: str) -> list[str]:
    """Return the lines in fenced blocks that call luthier, with continued lines joined."""
    bodies = [fence["body"].replace("\\\n", " ") for fence in FENCE.finditer(text)]
    lines = [line.strip().removeprefix("$ ") for body in bodies for line in body.splitlines()]
    return [line for line in lines if line.startswith("luthier ")]


def false_command(line: str, root_command: Any) -> str | None:
    """Return what is wrong with a command line of a page (no such command, no such option), or None."""
    import typer

    command, context = root_command, typer.Context(root_command, info_name="luthier")
    words = shlex.split(line, comments=True)[1:]
    while words and hasattr(command, "get_command") and not words[0].startswith("-"):
        child = command.get_command(context, words[0])
        if child is None:
            return f"{line!r}: no command {words[0]!r}"
        command, context = child, typer.Context(child, info_name=words.pop(0), parent=context)
    known = {"--help", *(option for one in command.get_params(context) for option in [*one.opts, *one.secondary_opts])}
    unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in known]
    return f"{line!r}: unknown {unknown}" if unknown else None


@each_page
def test_snippets_are_cut_from_examples(page: Path) -> None:
    assert not false_snippets(page.read_text(encoding="utf-8"), ROOT)


@each_page
def test_commands_on_a_page_exist(page: Path) -> None:
    lines = command_lines(page.read_text(encoding="utf-8"))
    if not lines:
        return
    import typer

    from luthier.cli.app import app

    root_command = typer.main.get_command(app)
    faults = [fault for line in lines if (fault := false_command(line, root_command))]
    assert not faults


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not broken


def test_the_readme_shows_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("quickstart", "test"):
        assert f"make {target}" in readme
        assert f"\n{target}:" in makefile


def test_a_drifted_snippet_is_seen(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/one.py").write_text("import luthier\n\nx = 1\n")
    marked = "<!-- from examples/one.py -->\n```python\n{}\n```\n"
    assert not false_snippets(marked.format("x = 1"), tmp_path)
    assert false_snippets(marked.format("x = 2"), tmp_path)
    assert false_snippets(marked.replace("one.py", "two.py").format("x = 1"), tmp_path)
    assert false_snippets("Look:\n```python\nx = 1\n```\n", tmp_path)
    assert not false_snippets("Look:\n```bash\nx = 1\n```\n", tmp_path)


def test_a_false_command_is_seen() -> None:
    import typer

    app = typer.Typer()

    @app.command()
    def train(rows: str, r: int = 8) -> None: ...

    @app.command()
    def other() -> None: ...

    root_command = typer.main.get_command(app)
    lines = command_lines("Say\n```bash\n$ luthier train rows.jsonl \\\n  --r 16  # wide\nluthier --help\necho luthier\n```\n")
    assert len(lines) == 2
    assert not [fault for line in lines if (fault := false_command(line, root_command))]
    assert "no command 'trian'" in str(false_command("luthier trian rows.jsonl", root_command))
    assert "--rank" in str(false_command("luthier train rows.jsonl --rank 16", root_command))
