"""An adapter, its base and what serves now on the same suites, for the gate: `luthier gate` and `luthier registry rebase`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from luthier.cli.loading import Loaded
    from luthier.evaluate import Contestant, GateReport, Policy, Suite


def check_suites(suites: "Sequence[Suite]", policy: "Policy", *, has_incumbent: bool) -> None:
    """Raise ConfigError for what the policy asks for and was not named, before any suite is run."""
    from luthier.evaluate.gate import check_named

    check_named({suite.name: suite.definition.kind for suite in suites}, policy, has_incumbent=has_incumbent)


def trained_on(adapter: str | Path, train: str | None, suites: "Sequence[Suite]", console: Any) -> dict[str, Any]:
    """Return, by suite, the items that are in the training rows: those given, or those that the adapter's recipe names."""
    from luthier.cli.loading import recipe_of
    from luthier.data.read import stream_rows
    from luthier.evaluate.contamination import find_contamination

    rows = train or recipe_of(adapter).get("data", {}).get("path")
    if train is None and (rows is None or not Path(rows).is_file()):
        console.print("The training rows are not here, so no item was looked for in them; name them with --train.")
        return {}
    return dict(find_contamination(stream_rows(rows), suites).item_ids)


def contestants(
    adapter: str | Path, loaded: "Loaded", suites: "Sequence[Suite]", *, batch_tokens: int, remember: bool, console: Any
) -> "tuple[Contestant, Contestant]":
    """Put the suites to the adapter that is on a base and to the base; return both, the adapter first."""
    from luthier.cli.suites import put_suites
    from luthier.evaluate import Contestant
    from luthier.formats.adapters import fingerprint_of

    runs = put_suites(loaded, suites, batch_tokens=batch_tokens, remember=remember, console=console)
    base = Contestant(tuple(run.base for run in runs), fingerprint=fingerprint_of(loaded.base.model).identity())
    scores = tuple(run.adapter for run in runs if run.adapter is not None)
    return Contestant(scores, adapter=str(adapter), manifest_digest=_manifest_of(adapter)), base


def incumbent_on(
    adapter: str | Path, loaded: "Loaded", suites: "Sequence[Suite]", *, name: str, batch_tokens: int, console: Any
) -> "Contestant":
    """Put the suites to the adapter that is on a base, and not to the base; `name` is what reports call it."""
    from luthier.cli.progress import progress_bar
    from luthier.evaluate import Contestant, run_suite

    model, tokenizer = loaded.base.model, loaded.base.tokenizer
    with progress_bar(console) as on_progress:
        scores = tuple(
            run_suite(
                model,
                tokenizer,
                suite,
                batch_tokens=batch_tokens,
                served=loaded.served,
                on_progress=partial(on_progress, f"{suite.name}: incumbent"),
            )
            for suite in suites
        )
    return Contestant(scores, adapter=name, manifest_digest=_manifest_of(adapter))


def check_fits(adapter: str | Path, loaded: "Loaded", *, force: bool) -> None:
    """Raise BaseMismatchError or ConfigError for an adapter that cannot take the place of the one that is on a base."""
    from luthier.cli.loading import adapter_folder
    from luthier.formats.adapters import check_base
    from luthier.formats.folder import read_adapter

    folder = read_adapter(adapter_folder(adapter))
    check_base(loaded.base.model, folder, force=force)
    there = loaded.report.folder.minus if loaded.report else {}
    if loaded.base.packing is not None and (folder.minus or there):
        raise ConfigError(
            f"an adapter of init 'loftq' has 4-bit weights of its own, so {adapter} cannot be put on the candidate's base; give "
            f"its scores: luthier eval {adapter} --suite ... --save now.json, then --incumbent now.json"
        )


def put_on(adapter: str | Path, loaded: "Loaded", *, force: bool, name: str = "incumbent") -> "Loaded":
    """Put an adapter in the place of the one that is on a loaded base, which is not loaded again; its engine calls it `name`."""
    from luthier.cli.loading import adapter_folder, recipe_of, served_on
    from luthier.formats.adapters import swap_adapter

    report = swap_adapter(loaded.base.model, adapter_folder(adapter), force=force)
    served = loaded.served and served_on(loaded.served.engine, adapter, name, force=force)
    return replace(loaded, report=report, recipe=recipe_of(adapter), served=served)


def judged(
    candidate: "Contestant", base: "Contestant", incumbent: "Contestant | None", policy: "Policy", left_out: dict[str, Any]
) -> "GateReport":
    """Return the gate's decision on these scores."""
    from luthier.evaluate import Subjects, decide

    named = incumbent.adapter if incumbent else None
    subjects = Subjects(candidate.adapter, candidate.manifest_digest, base.fingerprint, named)
    served = incumbent.suites if incumbent else None
    return decide(candidate.suites, base.suites, served, policy, contaminated=left_out, subjects=subjects)


def _manifest_of(adapter: str | Path) -> str:
    from luthier.cli.loading import adapter_folder
    from luthier.registry.intake import examine

    return examine(adapter_folder(adapter)).manifest_digest
