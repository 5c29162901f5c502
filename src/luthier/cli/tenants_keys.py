"""`luthier tenants keys | revoke`: keys, each shown once."""

from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.output import JSON, make_console, print_json
from luthier.cli.registry_opening import ACTOR, REGISTRY, caller, opened, table_of
from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

keys_app = typer.Typer(help="The keys of tenants.", no_args_is_help=True, rich_markup_mode=None)
TENANT = typer.Argument(help="A tenant.")
KEY_NAME = typer.Argument(metavar="NAME", help="The key's name: who or what will hold it.")


@keys_app.command("issue")
def issue(
    tenant: str = TENANT,
    name: str = KEY_NAME,
    scope: list[str] = typer.Option(
        ["inference"],
        help="What it may do: inference, admin, register, promote, approve; repeat it. One of the last three makes the registry "
        "ask for keys from now on.",
    ),
    expires: str | None = typer.Option(None, metavar="TIME", help="When it ends (2027-06-30, UTC unless a zone is given)."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Make a key and print it, this once: the registry keeps its SHA-256 only."""
    console = make_console(as_json)
    from luthier.cli.registry_serving import moment_of
    from luthier.registry.tenancy import Scope
    from luthier.registry.tenants import find_tenant, is_protected, issue_key

    if unknown := sorted(set(scope) - set(Scope)):
        raise ConfigError(f"--scope is {', '.join(unknown)}; needed one or several of {', '.join(Scope)}")
    store = opened(registry)
    who = caller(store, actor, "admin")
    with store.database.writing() as session:
        before = is_protected(session)
        row, secret = issue_key(
            session,
            find_tenant(session, tenant),
            name,
            [Scope(word) for word in scope],
            actor=who,
            expires_at=moment_of(expires) if expires else None,
        )
        begins = is_protected(session) and not before
    if as_json:
        told = {"tenant": tenant, "name": name, "scopes": row.scopes, "expires_at": row.expires_at}
        print_json(told | {"key": secret, "registry_asks_for_keys_from_now_on": begins})
        return
    typer.echo(secret)
    console.print(
        f"This is the key {tenant}/{name} ({', '.join(row.scopes)}). Keep it now: it cannot be shown again.", soft_wrap=True
    )
    if begins:
        console.print(
            "From now on this registry asks for keys: to register, promote or approve, set LUTHIER_API_KEY to one that may.",
            style="yellow",
            soft_wrap=True,
        )


@keys_app.command("list")
def list_all(
    tenant: str | None = typer.Argument(None, help="A tenant. Default: all."),
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """List keys by name and by how they begin, with what they may do and whether they work."""
    console = make_console(as_json)
    from luthier.registry.tenants import find_tenant, list_keys

    with opened(registry).database.reading() as session:
        found = list_keys(session, find_tenant(session, tenant) if tenant else None)
    if as_json:
        print_json({"keys": found})
    else:
        console.print(table_of_keys(found) if found else "No keys yet; make one with: luthier tenants keys issue TENANT NAME")


def revoke(
    tenant: str = TENANT,
    name: str = KEY_NAME,
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """End a key for good. Gateways hear of it within seconds."""
    console = make_console(as_json)
    from luthier.registry.tenants import find_tenant, revoke_key

    store = opened(registry)
    who = caller(store, actor, "admin")
    with store.database.writing() as session:
        row = revoke_key(session, find_tenant(session, tenant), name, actor=who)
    told = {"tenant": tenant, "name": name, "revoked_at": row.revoked_at}
    print_json(told) if as_json else console.print(f"{tenant}/{name} is revoked", highlight=False)


def table_of_keys(keys: list[dict[str, Any]]) -> "Table":
    """Return keys as a table."""
    table = table_of("key", "begins", "scopes", "state", "made", "ends")
    for one in keys:
        ends = f"{one['expires_at']:%Y-%m-%d %H:%M}" if one["expires_at"] else ""
        made = f"{one['created_at']:%Y-%m-%d} by {one['created_by']}"
        table.add_row(f"{one['tenant']}/{one['name']}", one["shown"], ", ".join(one["scopes"]), one["state"], made, ends)
    return table
