"""`luthier tenants usage`: what was used, by day or by version."""

from datetime import UTC

import typer

from luthier.cli.output import JSON, make_console, print_json
from luthier.cli.registry_opening import REGISTRY, opened, table_of
from luthier.core.errors import ConfigError

DAY, VERSION = "day", "version"


def usage(
    tenant: str | None = typer.Argument(None, help="A tenant. Default: all."),
    by: str = typer.Option(DAY, help="day (UTC) or version."),
    since: str | None = typer.Option(None, metavar="TIME", help="From this moment on, or with days from its day (2026-11-24)."),
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Show requests and tokens, as gateways recorded them. Tokens of prompts include those that were cached."""
    console = make_console(as_json)
    from luthier.cli.registry_serving import moment_of
    from luthier.registry.tenants import find_tenant
    from luthier.registry.usage import usage_by_day, usage_by_version

    if by not in (DAY, VERSION):
        raise ConfigError(f"--by is {by!r}; needed {DAY} or {VERSION}")
    moment = moment_of(since) if since else None
    with opened(registry).database.reading() as session:
        tenant_id = find_tenant(session, tenant).id if tenant else None
        if by == DAY:
            found = usage_by_day(session, tenant_id=tenant_id, since=moment and moment.astimezone(UTC).date())
        else:
            found = usage_by_version(session, tenant_id=tenant_id, since=moment)
    if as_json:
        counted = [{key: value for key, value in one.__dict__.items() if key != "what"} | {by: one.what} for one in found]
        print_json({"usage": counted})
        return
    table = table_of("tenant", by, "#requests", "#prompt tokens", "#of them cached", "#answer tokens")
    for one in found:
        what = str(one.what or "the bare base")
        counts = (one.requests, one.prompt_tokens, one.cached_tokens, one.completion_tokens)
        table.add_row(one.tenant, what, *(f"{count:,}" for count in counts))
    console.print(table if found else "Nothing was used yet.")
