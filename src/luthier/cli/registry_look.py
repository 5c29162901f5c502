"""`luthier registry list | show | search`: what is in the registry."""

from typing import Any

import typer

from luthier.cli.output import JSON, make_console, print_json
from luthier.cli.registry_opening import REGISTRY, VERSION, opened, table_of


def list_registered(
    name: str | None = typer.Argument(None, help="An adapter, to list its versions."),
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """List the adapters, or the versions of one."""
    console = make_console(as_json)
    from luthier.registry.versions import find_adapter, list_adapters, list_versions, versions_of

    store = opened(registry)
    with store.database.reading() as session:
        if name is not None:
            find_adapter(session, name)
            versions = list_versions(session, versions_of(name))
            print_json({"registry": store.place, "versions": versions}) if as_json else console.print(_versions_table(versions))
            return
        adapters = list_adapters(session)
    if as_json:
        print_json({"registry": store.place, "adapters": adapters})
        return
    table = table_of("adapter", "owner", "#versions", "#newest", "aliases", "serves")
    for entry in adapters:
        aliases, serves = (", ".join(f"{word}:{number}" for word, number in entry[key].items()) for key in ("aliases", "serves"))
        table.add_row(entry["name"], entry["owner"], str(entry["num_versions"]), str(entry["newest"] or "-"), aliases, serves)
    console.print(
        table if adapters else f"No adapters in {store.place} yet; add one with: luthier registry add FOLDER --name NAME"
    )


def search(
    words: list[str] = typer.Argument(None, help="Words that names, texts, owners or bases hold; or the beginning of a digest."),
    base: str | None = typer.Option(None, help="Part of the base's name, or the beginning of its fingerprint's digest."),
    owner: str | None = typer.Option(None, help="Who answers for the adapter."),
    lifecycle: str | None = typer.Option(None, help="candidate, retired or erased."),
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Search the versions; all of the words must be found."""
    console = make_console(as_json)
    from luthier.core.errors import ConfigError
    from luthier.registry.columns import Lifecycle
    from luthier.registry.versions import list_versions, matching

    if lifecycle is not None and lifecycle not in list(Lifecycle):
        raise ConfigError(f"--lifecycle is {lifecycle!r}; needed one of {', '.join(Lifecycle)}")
    store = opened(registry)
    chosen = Lifecycle(lifecycle) if lifecycle else None
    with store.database.reading() as session:
        query = matching(" ".join(words or []), base=base, owner=owner, lifecycle=chosen)
        versions = list_versions(session, query)
    if as_json:
        print_json({"registry": store.place, "versions": versions})
        return
    console.print(_versions_table(versions) if versions else "Nothing found.")


def show(
    reference: str = VERSION,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Show all that is known of a version: origin, files, owner, where it is served."""
    console = make_console(as_json)
    from luthier.registry.versions import find_version, show_version

    store = opened(registry)
    with store.database.reading() as session:
        told = show_version(session, find_version(session, reference))
    if as_json:
        print_json(told)
        return
    table = table_of("", f"{told['name']}:{told['version']}")
    for key, value in told.items():
        if key not in ("name", "version") and value not in (None, "", [], {}):
            table.add_row(key.replace("_", " "), "\n".join(_lines(value)))
    console.print(table)


def _lines(value: Any) -> list[str]:
    """A value of a version in lines that people read."""
    if isinstance(value, list):
        return [line for inner in value for line in _lines(inner)]
    if isinstance(value, dict):
        return ["  ".join(f"{key}={inner}" for key, inner in value.items() if inner is not None)]
    return [f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)]


def _versions_table(versions: list[dict[str, Any]]) -> Any:
    table = table_of("version", "state", "base", "#rank", "#parameters", "#MB", "added", "by")
    for entry in versions:
        state = f"held: {entry['hold_reason']}" if entry["hold_reason"] else entry["lifecycle"]
        table.add_row(
            f"{entry['name']}:{entry['version']}",
            state,
            entry["base"] or "unknown",
            str(entry["rank"]),
            f"{entry['num_parameters']:,}",
            f"{entry['size_bytes'] / 1e6:.2f}",
            f"{entry['created_at']:%Y-%m-%d %H:%M}",
            entry["created_by"],
        )
    return table
