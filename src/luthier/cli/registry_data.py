"""`luthier registry data add | list | show | subjects`: what was learned from, and why it may be."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.output import JSON, make_console, print_json
from luthier.cli.registry_opening import ACTOR, REGISTRY, caller, opened, table_of
from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from luthier.registry.people import SubjectKey

data_app = typer.Typer(
    help="Data sets: contents by digest, their owners, terms and origin, and whose rows are in them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
SUBJECT_KEY = typer.Option(
    None,
    "--subject-key",
    help="File with the key that hides people. Default: LUTHIER_SUBJECT_KEY, or subject.key in ~/.config/luthier.",
)


@data_app.command("add")
def add(
    name: str = typer.Argument(help="The data set; a new content becomes its next version."),
    source: str = typer.Argument(help="A file of rows (JSONL, JSON, Parquet), a folder, or a Hub data set."),
    held_out: Path | None = typer.Option(None, help="The file of a run's data.eval_path: it records one digest for both."),
    owner: str | None = typer.Option(None, help="Who answers for it; needed where the data set is new."),
    license: str | None = typer.Option(None, help="Its licence."),
    legal_basis: str | None = typer.Option(None, help="Why people's data may be used: consent, contract, legitimate interest."),
    purpose: str | None = typer.Option(None, help="What it may be used for."),
    special_category: bool | None = typer.Option(None, help="It tells of health, belief, origin and the like."),
    retention_until: datetime | None = typer.Option(None, formats=["%Y-%m-%d"], help="The day until which it may be kept."),
    parent: list[str] = typer.Option([], help="What it was made of and how, as in orders:1=filtered; repeat it."),
    subjects: str | None = typer.Option(None, help="The column that names the people whose rows these are."),
    subject_key: Path | None = SUBJECT_KEY,
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Add a content to a data set."""
    console = make_console(as_json)
    from luthier.registry.datasets import Terms, add_data
    from luthier.registry.people import SubjectColumn, make_key

    until = retention_until and retention_until.replace(tzinfo=UTC)
    terms = Terms(owner, license, legal_basis, purpose, special_category, until)
    column = SubjectColumn(subjects, make_key(key_path(subject_key))) if subjects else None
    parents = [_parent(one) for one in parent]
    store = opened(registry, create=True)
    how: dict[str, Any] = {"parents": parents, "subjects": column, "held_out": held_out}
    added = add_data(store.database, name, source, terms, actor=caller(store, actor, "register"), **how)
    rows = "" if added.num_rows is None else f", {added.num_rows:,} rows"
    people = f" of {added.num_subjects:,} people" if subjects else ""
    console.print(f"{added.name}:{added.version} {'added' if added.is_new else 'was there'}{rows}{people}; digest {added.digest}")
    if as_json:
        print_json(added.__dict__)


@data_app.command("list")
def list_all(registry: str | None = REGISTRY, as_json: bool = JSON) -> None:
    """List all versions of all data sets."""
    console = make_console(as_json)
    from luthier.registry.datasets import list_data

    store = opened(registry)
    with store.database.reading() as session:
        found = list_data(session)
    if as_json:
        print_json({"registry": store.place, "data": found})
        return
    table = table_of("data set", "state", "#rows", "owner", "licence", "legal basis", "keep until", "digest")
    for one in found:
        until = f"{one['retention_until']:%Y-%m-%d}" if one["retention_until"] else ""
        terms = [one["owner"], one["license"] or "", one["legal_basis"] or "", until, one["digest"][:16]]
        table.add_row(f"{one['name']}:{one['version']}", one["state"], f"{one['num_rows'] or 0:,}", *terms)
    console.print(table if found else f"No data sets in {store.place} yet; add one with: luthier registry data add NAME FILE")


@data_app.command("show")
def show(
    name: str = typer.Argument(metavar="NAME[:VERSION]", help="A data set, or one version of it."),
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Show all that is known of a data set: terms, origin, how many people, where it lies."""
    console = make_console(as_json)
    from luthier.registry.datasets import show_data

    with opened(registry).database.reading() as session:
        found = show_data(session, name)
    if as_json:
        print_json({"data": found})
        return
    for one in found:
        console.print(f"{one['name']}:{one['version']}", style="bold")
        for word in [key for key in one if key not in ("name", "version")]:
            value = one[word]
            for each in value if isinstance(value, list) else [value]:
                shown = ", ".join(map(str, each.values())) if isinstance(each, dict) else each
                console.print(f"  {word.replace('_', ' ')}: {'-' if shown is None else shown}", soft_wrap=True)


@data_app.command("subjects")
def subjects(
    name: str = typer.Argument(metavar="NAME:VERSION", help="A data set version."),
    source: Path = typer.Argument(help="Its rows: the file must have the version's digest."),
    column: str = typer.Option(..., help="The column that names people."),
    subject_key: Path | None = SUBJECT_KEY,
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Index the people in a data set version, as digests under a key that is kept elsewhere."""
    console = make_console(as_json)
    from luthier.registry.datasets import add_subjects
    from luthier.registry.people import SubjectColumn, make_key

    chosen = SubjectColumn(column, make_key(key_path(subject_key)))
    store = opened(registry)
    count = add_subjects(store.database, name, source, chosen, actor=caller(store, actor, "register"))
    console.print(f"{name}: {count:,} people indexed")
    if as_json:
        print_json({"name": name, "num_subjects": count})


def key_path(given: Path | None) -> Path:
    """Return where the key lies that hides people."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return given or Path(os.environ.get("LUTHIER_SUBJECT_KEY") or home / "luthier" / "subject.key")


def subject_key_of(given: Path | None) -> "SubjectKey":
    """Return the key that hides people; it is never made here, since a new one would find nobody."""
    from luthier.registry.people import read_key

    return read_key(key_path(given))


def _parent(told: str) -> tuple[str, str]:
    name, equals, transform = told.partition("=")
    if not equals:
        raise ConfigError(f"--parent is {told!r}; say how the data was made of it, as in {told}=filtered")
    return name, transform
