"""`luthier registry surface | approve | hold | release`: where answers are seen, by which rules, and people's words."""

from typing import Any

import typer

from luthier.cli.output import JSON, make_console, print_json
from luthier.cli.registry_opening import ACTOR, REGISTRY, VERSION, caller, opened, table_of
from luthier.core.errors import ConfigError

surface_app = typer.Typer(
    help="Surfaces, where answers are seen, and the rules that a version must meet there.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
RULE = typer.Option(
    None,
    "--rule",
    metavar="NAME=VALUE",
    help="A rule: approvals=2, gate_age_days=30 (or none), policy=DIGEST, inconclusive=true, base=DIGEST, signature=true.",
)


@surface_app.command("add")
def add_surface(
    name: str = typer.Argument(help="The surface's name; it becomes an alias of what is promoted there."),
    audience: str = typer.Option(..., help="Who sees the answers: customer, internal or batch."),
    owner: str | None = typer.Option(None, help="Who answers for it. Default: who adds it."),
    rule: list[str] = RULE,
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Add a surface. Customers need two approvals and a passing gate by default, others a gate that did not fail."""
    console = make_console(as_json)
    from luthier.registry.surfaces import add_surface as add

    store = opened(registry, create=True)
    who = caller(store, actor, "promote")
    with store.database.writing() as session:
        surface = add(session, name, audience_of(audience), owner=owner or who, actor=who, rules=_rules(rule))
        told = {"surface": surface.name, "audience": surface.audience, "owner": surface.owner, "rules": surface.rules}
        rules = _told(surface.rules)
    print_json(told) if as_json else console.print(f"{name}: {rules}", highlight=False)


@surface_app.command("set")
def set_rules(
    name: str = typer.Argument(help="A surface."),
    rule: list[str] = RULE,
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Change rules of a surface; the next promotion meets them."""
    console = make_console(as_json)
    from luthier.registry.surfaces import change_rules, find_surface

    if not rule:
        raise ConfigError("nothing to change; say what with --rule NAME=VALUE")
    store = opened(registry)
    who = caller(store, actor, "promote")
    with store.database.writing() as session:
        rules = change_rules(session, find_surface(session, name), _rules(rule), actor=who).model_dump()
    print_json({"surface": name, "rules": rules}) if as_json else console.print(f"{name}: {_told(rules)}", highlight=False)


@surface_app.command("list")
def list_surfaces(registry: str | None = REGISTRY, as_json: bool = JSON) -> None:
    """List the surfaces, their rules and what serves them."""
    console = make_console(as_json)
    from luthier.registry.production import list_surfaces as listed

    with opened(registry).database.reading() as session:
        surfaces = listed(session)
    if as_json:
        print_json({"surfaces": surfaces})
        return
    table = table_of("surface", "audience", "owner", "serves", "rules")
    for one in surfaces:
        serves = "\n".join(f"{version} {weight / 100:g} %" for version, weight in one["serves"].items())
        table.add_row(one["name"], one["audience"], one["owner"], serves or "nothing", _told(one["rules"]))
    console.print(table if surfaces else "No surfaces yet; add one with: luthier registry surface add NAME --audience customer")


def approve(
    version: str = VERSION,
    surface: str | None = typer.Option(None, help="For this surface. Default: for all."),
    reject: bool = typer.Option(False, "--reject", help="Object instead; the version is then refused until this is taken back."),
    role: str = typer.Option("reviewer", help="As what you say so."),
    comment: str = typer.Option("", help="Why, for whoever reads it later."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Approve a version, or object to it. Whoever registered it cannot; a person's last word counts."""
    console = make_console(as_json)
    from luthier.registry.surfaces import approve as word
    from luthier.registry.surfaces import find_surface
    from luthier.registry.versions import find_version, name_of

    store = opened(registry)
    who = caller(store, actor, "approve")
    with store.database.writing() as session:
        chosen = find_version(session, version)
        place = find_surface(session, surface) if surface else None
        word(session, chosen, place, actor=who, role=role, is_granted=not reject, comment=comment)
        told = {"version": name_of(chosen), "surface": surface, "actor": who, "is_granted": not reject}
    verb = "objects to" if reject else "approves"
    print_json(told) if as_json else console.print(f"{who} {verb} {told['version']} for {surface or 'all surfaces'}")


def hold(
    version: str = VERSION,
    reason: str = typer.Option(..., help="Why nobody may use it now."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Forbid that a version is promoted or resolved, until it is released."""
    _held(version, reason, actor, registry, as_json)


def release(version: str = VERSION, actor: str | None = ACTOR, registry: str | None = REGISTRY, as_json: bool = JSON) -> None:
    """Lift the hold of a version."""
    _held(version, None, actor, registry, as_json)


def _held(version: str, reason: str | None, actor: str | None, registry: str | None, as_json: bool) -> None:
    console = make_console(as_json)
    from luthier.registry.production import in_production
    from luthier.registry.surfaces import hold as lay
    from luthier.registry.surfaces import release as lift
    from luthier.registry.versions import find_version, name_of

    store = opened(registry)
    who = caller(store, actor, "promote")
    with store.database.writing() as session:
        chosen = find_version(session, version)
        if reason is None:
            lift(session, chosen, actor=who)
        else:
            lay(session, chosen, reason, actor=who)
        name = name_of(chosen)
        serves = [one.surface for one in in_production(session, adapter=chosen.adapter.name) if one.version == chosen.version]
    if as_json:
        print_json({"version": name, "hold_reason": reason, "serves": serves})
        return
    console.print(f"{name} is {'held' if reason else 'released'}")
    if reason and serves:
        console.print(f"It still serves {', '.join(serves)}: luthier registry rollback {serves[0]}", soft_wrap=True)


def audience_of(word: str) -> Any:
    """Return an audience by its word. Raises: ConfigError."""
    from luthier.registry.columns import Audience

    if word not in list(Audience):
        raise ConfigError(f"--audience is {word!r}; needed one of {', '.join(Audience)}")
    return Audience(word)


def _rules(given: list[str] | None) -> dict[str, Any]:
    rules: dict[str, Any] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--rule {text!r} has no value; needed NAME=VALUE")
        rules[name] = None if value.lower() == "none" else value
    return rules


def _told(rules: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in rules.items() if value not in (None, False))
