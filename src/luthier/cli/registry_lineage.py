"""`luthier registry trained-on | lineage`: what learned from a data set or a person's rows, and what came of what."""

from pathlib import Path
from typing import Any

import typer

from luthier.cli.output import JSON, make_console, print_json
from luthier.cli.registry_data import SUBJECT_KEY, subject_key_of
from luthier.cli.registry_opening import REGISTRY, VERSION, opened, table_of
from luthier.core.errors import ConfigError

SUBJECT = typer.Option(None, help="A person's identifier, as in the column that was indexed.")


def trained_on(
    dataset: str | None = typer.Argument(None, metavar="DATASET[:VERSION]", help="A data set, or one version of it."),
    subject: str | None = SUBJECT,
    subject_key: Path | None = SUBJECT_KEY,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """List every version that learned from a data set or from a person's rows, itself or by a parent, and where it is served."""
    console = make_console(as_json)
    from luthier.registry import lineage
    from luthier.registry.datasets import check_key, find_versions

    if (dataset is None) == (subject is None):
        raise ConfigError("name a data set, or a person with --subject")
    with opened(registry).database.reading() as session:
        if subject is not None:
            key = subject_key_of(subject_key)
            check_key(session, key)
            person = key.hmac(subject)
            data, found = lineage.holding_person(session, person), lineage.trained_on_person(session, person)
        else:
            ids = [version.id for version in find_versions(session, str(dataset))]
            data, found = lineage.made_of_data(session, ids), lineage.trained_on(session, ids)
    if as_json:
        print_json({"data": [one.__dict__ for one in data], "versions": [one.as_dict() for one in found]})
        return
    console.print(f"Data: {', '.join(f'{one.name}:{one.version} ({one.state})' for one in data) or 'none'}", soft_wrap=True)
    served = sum(bool(one.serving) for one in found)
    console.print(f"{len(found):,} versions learned from it, {served:,} of them in production.")
    if found:
        console.print(versions_table(found))


def lineage(
    reference: str = VERSION,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Show what a version was made of, what was made of it, and all data it has seen."""
    console = make_console(as_json)
    from luthier.registry import lineage as questions
    from luthier.registry.versions import find_version

    with opened(registry).database.reading() as session:
        version = find_version(session, reference)
        above = questions.ancestors(session, version.id)
        below = questions.descendants(session, [version.id])
        data = questions.data_seen(session, version.id)
    if as_json:
        told: dict[str, Any] = {"ancestors": [one.as_dict() for one in above], "descendants": [one.as_dict() for one in below]}
        print_json({"version": reference, **told, "data": [one.__dict__ for one in data]})
        return
    for title, found in (("made of", above), ("made of it", below)):
        console.print(f"{title}: {len(found):,} versions")
        if found:
            console.print(versions_table(found))
    console.print("data it has seen: " + (", ".join(f"{one.name}:{one.version} ({one.state})" for one in data) or "none"))


def versions_table(found: list[Any]) -> Any:
    """Return a table of versions that a question found."""
    table = table_of("version", "itself", "state", "in production")
    for one in found:
        state = one.lifecycle.value + (", held" if one.hold_reason else "")
        where = ", ".join(f"{each.surface} ({each.audience}, {each.weight_bp / 100:g} %)" for each in one.serving)
        table.add_row(f"{one.name}:{one.version}", "yes" if one.is_direct else "by a parent", state, where)
    return table
