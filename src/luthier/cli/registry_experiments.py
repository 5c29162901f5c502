"""`luthier registry experiment`: A/B experiments on a surface."""

from collections.abc import Callable
from typing import Any, TypeVar

import typer

from luthier.cli.output import JSON, make_console, print_json
from luthier.cli.registry_opening import ACTOR, REGISTRY, caller, opened, table_of
from luthier.core.errors import ConfigError

experiment_app = typer.Typer(
    help="A/B experiments: versions that share a surface for a while.", no_args_is_help=True, rich_markup_mode=None
)
Number = TypeVar("Number", int, float)
SURFACE = typer.Argument(help="The surface.")
ARM = typer.Option(
    ...,
    "--arm",
    metavar="NAME:VERSION=SHARE",
    help="An arm and its share in basis points (1000 is 10 %); the control keeps the rest.",
)


@experiment_app.command("start")
def start(
    surface: str = SURFACE,
    name: str = typer.Argument(help="The experiment's name."),
    arm: list[str] = ARM,
    unit: str = typer.Option("user", help="What keeps its arm: user, session, tenant."),
    metric: str | None = typer.Option(None, help="Guardrail: what is watched, such as rating."),
    worse_by: float | None = typer.Option(None, min=0, help="Guardrail: how much worse than the control an arm may be."),
    lower_is_better: bool = typer.Option(False, "--lower-is-better", help="Guardrail: less of the metric is better."),
    exposures: int = typer.Option(100, min=1, help="Guardrail: units that must have seen an arm before it counts."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Begin an experiment: what serves the surface is the control, and every arm must be allowed to serve by itself."""
    from luthier.registry.experiments import Guardrail, start_experiment

    if (metric is None) != (worse_by is None):
        raise ConfigError("a guardrail takes both --metric and --worse-by")
    watched = None
    if metric is not None and worse_by is not None:
        watched = Guardrail(metric=metric, worse_by=worse_by, higher_is_better=not lower_is_better, exposures=exposures)
    store = opened(registry)
    who = caller(store, actor, "promote")
    start_experiment(store, surface, name, _weights(arm), actor=who, unit=unit, guardrail=watched, keys=_keys())
    _show(store, surface, name, as_json)


@experiment_app.command("weights")
def weights(
    surface: str = SURFACE,
    arm: list[str] = ARM,
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Give the running experiment other shares or other arms; exposures are counted anew."""
    from luthier.registry.experiments import change_weights

    store = opened(registry)
    changed = change_weights(store, surface, _weights(arm), actor=caller(store, actor, "promote"), keys=_keys())
    _show(store, surface, changed.name, as_json)


@experiment_app.command("stop")
def stop(
    surface: str = SURFACE,
    reason: str = typer.Option("", help="Why; the audit chain keeps its digest."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """End the running experiment; the control serves alone again. An arm that won is promoted then."""
    from luthier.registry.experiments import find_experiment, stop_experiment
    from luthier.registry.surfaces import find_surface

    store = opened(registry)
    who = caller(store, actor, "promote")
    with store.database.writing() as session:
        experiment = find_experiment(session, find_surface(session, surface))
        stop_experiment(session, experiment, actor=who, reason=reason)
    _show(store, surface, experiment.name, as_json)


@experiment_app.command("count")
def count(
    surface: str = SURFACE,
    seen: list[str] = typer.Option(
        ..., "--seen", metavar="NAME:VERSION=UNITS", help="An arm and how many more units have seen it; repeat it."
    ),
    epoch: int | None = typer.Option(None, min=1, help="The epoch they were counted in. Default: the present one."),
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Add to the exposures of the running experiment: sums by arm, no unit is kept."""
    from luthier.registry.experiments import count_exposures, find_experiment
    from luthier.registry.surfaces import find_surface
    from luthier.registry.versions import find_version

    counts = _by_arm("--seen", seen, int, "NAME:VERSION=UNITS, such as orders:4=120")
    if min(counts.values()) < 0:
        raise ConfigError("--seen adds; a count cannot be below 0")
    store = opened(registry)
    caller(store, None, "promote")  # sums have no author, but who may stop an experiment may also count for it
    with store.database.writing() as session:
        experiment = find_experiment(session, find_surface(session, surface))
        for arm, units in counts.items():
            count_exposures(session, experiment, {find_version(session, arm).id: units}, epoch=epoch)
    _show(store, surface, experiment.name, as_json)


@experiment_app.command("check")
def check(
    surface: str = SURFACE,
    measured: list[str] = typer.Option(
        ..., "--measured", metavar="NAME:VERSION=MEAN", help="The metric's mean for an arm; once for each, the control too."
    ),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Hold the guardrail against what was measured: an arm too bad ends it. Exit status: 0 it goes on, 1 stopped."""
    from luthier.registry.experiments import check_guardrail, find_experiment
    from luthier.registry.surfaces import find_surface
    from luthier.registry.versions import find_version, name_of

    means = _by_arm("--measured", measured, float, "NAME:VERSION=MEAN, such as orders:4=0.82")
    store = opened(registry)
    who = caller(store, actor, "promote")
    with store.database.writing() as session:
        experiment = find_experiment(session, find_surface(session, surface))
        named = {name_of(find_version(session, arm)): mean for arm, mean in means.items()}
        why = check_guardrail(session, experiment, named, actor=who)
    _show(store, surface, experiment.name, as_json, stopped=why)
    raise typer.Exit(why is not None)


@experiment_app.command("status")
def status(
    surface: str = SURFACE,
    name: str | None = typer.Option(None, help="An experiment that has ended. Default: the one that runs."),
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Show an experiment: its arms, what they were given and what they got."""
    _show(opened(registry), surface, name, as_json)


def _show(store: Any, surface: str, name: str | None, as_json: bool, **more: str | None) -> None:
    console = make_console(as_json)
    from luthier.registry.experiments import experiment_status, find_experiment
    from luthier.registry.surfaces import find_surface

    with store.database.reading() as session:
        told = experiment_status(session, find_experiment(session, find_surface(session, surface), name))
    if as_json:
        print_json(told | more)
        return
    ended = f", ended {told['ended_at']:%Y-%m-%d %H:%M}" if told["ended_at"] else ""
    console.print(f"{told['name']} on {surface}, epoch {told['epoch']}, by {told['unit']}{ended}", highlight=False)
    table = table_of("arm", "#share", "#exposures", "remarks")
    for arm, one in told["arms"].items():
        remarks = ["control"] if arm == told["control"] else []
        remarks += [f"HELD: {one['hold_reason']}"] if one["hold_reason"] else []
        remarks += [f"forced: {one['forced']}"] if one["forced"] else []
        table.add_row(arm, f"{one['weight_bp'] / 100:g} %", f"{one['exposures']:,}", ", ".join(remarks))
    console.print(table)
    if told["is_mismatched"]:
        console.print(
            f"The exposures do not fit the shares (p = {told['mismatch_p']:.2g}): do not compare the arms.", style="red"
        )
    if why := more.get("stopped"):
        console.print(f"Stopped: {why}. {told['control']} serves {surface} alone.", style="red", soft_wrap=True)


def _weights(arms: list[str]) -> dict[str, int]:
    return _by_arm("--arm", arms, int, "NAME:VERSION=SHARE, such as orders:4=1000")


def _by_arm(option: str, given: list[str], number: Callable[[str], Number], needed: str) -> dict[str, Number]:
    """What an option says of each arm. Raises: ConfigError for what is no number, and for an arm that is named twice."""
    found: dict[str, Number] = {}
    for text in given:
        version, equals, value = text.rpartition("=")
        try:
            if not equals or version in found:
                raise ValueError
            found[version] = number(value)
        except ValueError:
            twice = "names an arm twice" if version in found else "has no number"
            raise ConfigError(f"{option} {text!r} {twice}; needed {needed}") from None
    return found


def _keys() -> Any:
    from luthier.registry.signing import default_trusted, trusted_keys

    return trusted_keys(default_trusted())
