"""`luthier tenants grant | ungrant`: what a tenant may call that is not its own."""

import typer

from luthier.cli.output import JSON, make_console, print_json
from luthier.cli.registry_opening import ACTOR, REGISTRY, caller, opened
from luthier.core.errors import ConfigError

TENANT = typer.Argument(help="A tenant.")
ADAPTER = typer.Option([], "--adapter", metavar="NAME", help="An adapter: all its versions and aliases; repeatable.")
VERSION = typer.Option([], "--version", metavar="NAME:VERSION", help="One version; repeatable.")
SURFACE = typer.Option([], "--surface", metavar="NAME", help="A surface: whatever serves it; repeatable.")
BASE = typer.Option(False, "--base", help="The bare base model.")


def grant(
    tenant: str = TENANT,
    adapter: list[str] = ADAPTER,
    version: list[str] = VERSION,
    surface: list[str] = SURFACE,
    base: bool = BASE,
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Let a tenant call adapters, versions, surfaces or the base; all that are named, or none of them."""
    _change("grant", tenant, _named(adapter, version, surface, base), actor, registry, as_json)


def ungrant(
    tenant: str = TENANT,
    adapter: list[str] = ADAPTER,
    version: list[str] = VERSION,
    surface: list[str] = SURFACE,
    base: bool = BASE,
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Take grants back; all that are named, or none of them. What is a tenant's own stays so."""
    _change("ungrant", tenant, _named(adapter, version, surface, base), actor, registry, as_json)


def _named(adapter: list[str], version: list[str], surface: list[str], base: bool) -> list[tuple[str, str]]:
    """Pairs of a kind and a target. Raises: ConfigError for none."""
    named = [("adapter", one) for one in adapter] + [("version", one) for one in version] + [("surface", one) for one in surface]
    if not (named := named + [("base", "")] * base):
        raise ConfigError("say what: --adapter NAME, --version NAME:VERSION, --surface NAME or --base")
    return named


def _change(what: str, tenant: str, named: list[tuple[str, str]], actor: str | None, registry: str | None, as_json: bool) -> None:
    console = make_console(as_json)
    from luthier.registry import tenants
    from luthier.registry.tenancy import GrantKind

    store = opened(registry)
    who = caller(store, actor, "admin")
    change = tenants.grant if what == "grant" else tenants.ungrant
    with store.database.writing() as session:
        row = tenants.find_tenant(session, tenant)
        changed = [{"kind": kind, "target": change(session, row, GrantKind(kind), target, actor=who)} for kind, target in named]
    if as_json:
        print_json({"tenant": tenant, what: changed})
        return
    words = ", ".join(f"{one['kind']} {one['target']}".rstrip() for one in changed)
    verb = "may call" if what == "grant" else "is no longer granted"
    console.print(f"{tenant} {verb}: {words}", highlight=False, soft_wrap=True)
