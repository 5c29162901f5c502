"""`luthier tenants`: who is served, under which names and within which limits. Keys, grants and usage have files of their own."""

from typing import TYPE_CHECKING, Any

import typer

from luthier.cli import tenants_grants, tenants_keys, tenants_usage
from luthier.cli.output import JSON, make_console, print_json
from luthier.cli.registry_opening import ACTOR, REGISTRY, caller, opened, table_of
from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from luthier.registry.tenancy import Quotas

tenants_app = typer.Typer(
    help="Tenants of a gateway: their keys, what they may call, how much, and what they used.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
TENANT = typer.Argument(help="A tenant.")
REQUESTS = typer.Option(None, metavar="N", help="Requests that may begin within a minute; none: any number.")
TOKENS = typer.Option(None, metavar="N", help="Tokens of prompts and answers within a minute; none: any number.")
TOKENS_A_DAY = typer.Option(None, metavar="N", help="Tokens of prompts and answers within a day (UTC); none: any number.")
CONCURRENT = typer.Option(None, metavar="N", help="Requests at the same time; none: any number.")
THE_BASE = "<the base>"


@tenants_app.command("add")
def add(
    name: str = typer.Argument(help="The tenant's name; adapters that were registered with --tenant NAME are its own."),
    requests_per_minute: str | None = REQUESTS,
    tokens_per_minute: str | None = TOKENS,
    tokens_per_day: str | None = TOKENS_A_DAY,
    concurrent: str | None = CONCURRENT,
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Add a tenant. It can do nothing yet: give it a key, and grants for what is not its own."""
    console = make_console(as_json)
    from luthier.registry.tenancy import Quotas
    from luthier.registry.tenants import add_tenant

    quotas = _changed(
        Quotas(),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        tokens_per_day=tokens_per_day,
        concurrent=concurrent,
    )
    store = opened(registry, create=True)
    who = caller(store, actor, "admin")
    with store.database.writing() as session:
        add_tenant(session, name, actor=who, quotas=quotas)
    if as_json:
        print_json({"name": name, "quotas": quotas.model_dump()})
        return
    console.print(f"{name}: {limits(quotas.model_dump())}", highlight=False)
    console.print(f"Give it a key with: luthier tenants keys issue {name} KEY-NAME", style="dim", highlight=False)


@tenants_app.command("list")
def list_all(registry: str | None = REGISTRY, as_json: bool = JSON) -> None:
    """List the tenants with their limits, grants and the number of keys that work."""
    console = make_console(as_json)
    from luthier.registry.tenants import list_tenants

    with opened(registry).database.reading() as session:
        found = list_tenants(session)
    if as_json:
        print_json({"tenants": found})
        return
    table = table_of("tenant", "#keys", "limits", "granted", "")
    for one in found:
        state = "" if one["is_active"] else "not active"
        table.add_row(one["name"], str(one["num_working_keys"]), limits(one["quotas"]), granted(one["grants"]), state)
    console.print(table if found else "No tenants yet; add one with: luthier tenants add NAME")


@tenants_app.command("show")
def show(tenant: str = TENANT, registry: str | None = REGISTRY, as_json: bool = JSON) -> None:
    """Show a tenant: its limits, its keys, and every name that it may call now."""
    console = make_console(as_json)
    from luthier.registry.tenants import find_tenant, list_keys, list_tenants
    from luthier.registry.view import VersionTarget, read_view

    with opened(registry).database.reading() as session:
        row = find_tenant(session, tenant)
        told: dict[str, Any] = next(one for one in list_tenants(session) if one["name"] == tenant)
        told["keys"] = list_keys(session, row)
        view = read_view(session, base_name=THE_BASE)
    names = view.names.get(row.id, {})
    told["names"] = {}
    for name in view.listed.get(row.id, ()):
        target = names[name]
        told["names"][name] = target.reference if isinstance(target, VersionTarget) else None
    if as_json:
        print_json(told)
        return
    state = "" if told["is_active"] else " (not active: no key works)"
    console.print(f"{tenant}{state}: {limits(told['quotas'])}; granted: {granted(told['grants']) or 'nothing'}", highlight=False)
    console.print(tenants_keys.table_of_keys(told["keys"]) if told["keys"] else "It has no keys.")
    called = [name if version in (None, name) else f"{name} ({version})" for name, version in told["names"].items()]
    console.print(f"It may call: {', '.join(called) or 'nothing'}", highlight=False, soft_wrap=True)


@tenants_app.command("quota")
def quota(
    tenant: str = TENANT,
    requests_per_minute: str | None = REQUESTS,
    tokens_per_minute: str | None = TOKENS,
    tokens_per_day: str | None = TOKENS_A_DAY,
    concurrent: str | None = CONCURRENT,
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Change a tenant's limits; those that are not named stay. Gateways hear of it within seconds."""
    console = make_console(as_json)
    from luthier.registry.tenancy import Quotas
    from luthier.registry.tenants import find_tenant, set_quotas

    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
        "concurrent": concurrent,
    }
    if all(value is None for value in given.values()):
        raise ConfigError("nothing to change; say what, as in --tokens-per-day 100000 or --concurrent none")
    store = opened(registry)
    who = caller(store, actor, "admin")
    with store.database.writing() as session:
        row = find_tenant(session, tenant)
        quotas = _changed(Quotas(**row.quotas), **given)
        set_quotas(session, row, quotas, actor=who)
    if as_json:
        print_json({"name": tenant, "quotas": quotas.model_dump()})
    else:
        console.print(f"{tenant}: {limits(quotas.model_dump())}", highlight=False)


@tenants_app.command("deactivate")
def deactivate(tenant: str = TENANT, actor: str | None = ACTOR, registry: str | None = REGISTRY, as_json: bool = JSON) -> None:
    """Let none of a tenant's keys work until it is activated again."""
    _set_active(tenant, actor, registry, as_json, is_active=False)


@tenants_app.command("activate")
def activate(tenant: str = TENANT, actor: str | None = ACTOR, registry: str | None = REGISTRY, as_json: bool = JSON) -> None:
    """Let a tenant's keys work again."""
    _set_active(tenant, actor, registry, as_json, is_active=True)


tenants_app.add_typer(tenants_keys.keys_app, name="keys")
tenants_app.command("revoke")(tenants_keys.revoke)
tenants_app.command("grant")(tenants_grants.grant)
tenants_app.command("ungrant")(tenants_grants.ungrant)
tenants_app.command("usage")(tenants_usage.usage)


def limits(quotas: dict[str, Any]) -> str:
    """Return a tenant's quotas in words."""
    told = [f"{value:,} {name.replace('_', ' ')}" for name, value in quotas.items() if value is not None]
    return ", ".join(told) or "no limits"


def granted(grants: list[dict[str, str]]) -> str:
    """Return a tenant's grants in words."""
    return ", ".join(f"{one['kind']} {one['target']}".rstrip() for one in grants)


def _set_active(tenant: str, actor: str | None, registry: str | None, as_json: bool, *, is_active: bool) -> None:
    console = make_console(as_json)
    from luthier.registry import tenants

    store = opened(registry)
    who = caller(store, actor, "admin")
    with store.database.writing() as session:
        change = tenants.activate if is_active else tenants.deactivate
        change(session, tenants.find_tenant(session, tenant), actor=who)
    print_json({"name": tenant, "is_active": is_active}) if as_json else console.print(
        f"{tenant} is {'active' if is_active else 'not active: none of its keys works'}", highlight=False
    )


def _changed(quotas: "Quotas", **given: str | None) -> "Quotas":
    """Quotas with those that were given; none lifts one. Raises: ConfigError for what is no number from 1."""
    changed: dict[str, Any] = quotas.model_dump()
    for name, value in given.items():
        if value is None:
            continue
        if value.lower() != "none" and not (value.isascii() and value.isdecimal() and int(value)):
            raise ConfigError(f"--{name.replace('_', '-')} is {value!r}; needed a whole number from 1, or none")
        changed[name] = None if value.lower() == "none" else int(value)
    return type(quotas)(**changed)
