"""A training run becomes a version: its data, recipe, scores, environment and base are read from its folder, nothing is asked.

What the run folder holds besides the adapter (checkpoints, log) stays where it is; `register` notes the place, so that an erasure
finds it. Rows that the registry does not know are added as a data set named after their file; that they are still the
rows that were trained on is checked by their digest.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select

from luthier.core.errors import DataError, RegistryError
from luthier.data.read import digest_rows, stream_rows
from luthier.formats.note import CONFIG_FILE, read_note
from luthier.registry.datasets import Terms, add_data, find_content
from luthier.registry.datasets import name_of as data_name
from luthier.registry.place import Registry
from luthier.registry.registering import About, Registered, register
from luthier.registry.schema import Adapter, Dataset, DatasetVersion

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Source:
    """Rows that a run read: where they lay, and their digest, where the run says (not for a share of a file)."""

    location: str
    digest: str | None


@dataclass(frozen=True)
class Run:
    """What a folder says of how its adapter came to be. `folder` is None for an adapter's folder without its run."""

    adapter: Path
    folder: Path | None
    data: dict[str, Source]
    environment: dict[str, Any] | None


def read_run(path: str | Path) -> Run:
    """Return what is known of a run's folder, or of an adapter's folder alone.

    Raises: RegistryError for a run that has not finished, AdapterFormatError for a note that is damaged.
    """
    folder = Path(path)
    if (folder / CONFIG_FILE).is_file() or not (folder / "config.toml").is_file():
        note = read_note(folder) if folder.is_dir() else {}
        return Run(folder, None, _sources(note, {}), None)
    summary = _summary(folder)
    adapter = folder / "adapter"
    return Run(adapter, folder.absolute(), _sources(read_note(adapter), summary.get("data") or {}), summary.get("environment"))


def register_run(
    registry: Registry,
    path: str | Path,
    *,
    name: str,
    actor: str,
    owner: str | None = None,
    default_owner: str | None = None,
    datasets: Sequence[tuple[str, str]] = (),
    no_data_reason: str | None = None,
    parents: Sequence[tuple[str, str]] = (),
    about: About | None = None,
    run_id: str | None = None,
    **more: Any,
) -> Registered:
    """Make a finished run's adapter (or an adapter's folder) the next version of `name`; `more` goes to `register`.

    `datasets` or `no_data_reason` take the place of the data that the run names; `default_owner` answers for a name that is new
    where no owner is given. Raises: what `register` and `add_data` raise,
    DataError if the rows changed since the run.
    """
    run = read_run(path)
    if owner is None and _is_new(registry, name):
        owner = default_owner
    if not datasets and no_data_reason is None:
        datasets = _named_data(registry, run.data, owner or actor, actor)
    return register(
        registry,
        run.adapter,
        name=name,
        actor=actor,
        owner=owner,
        datasets=datasets,
        no_data_reason=no_data_reason,
        parents=parents,
        about=about,
        run_id=run_id or (run.folder.name if run.folder else None),
        environment=run.environment,
        **more,
    )


def _is_new(registry: Registry, name: str) -> bool:
    with registry.database.reading() as session:
        return session.scalar(select(Adapter.id).filter_by(name=name)) is None


def _summary(folder: Path) -> dict[str, Any]:
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text())
    except FileNotFoundError:
        raise RegistryError(
            f"{folder} has not finished: it has no {SUMMARY_FILE}. Carry on with: luthier train --resume {folder}"
        ) from None
    except ValueError as error:
        raise RegistryError(f"{folder / SUMMARY_FILE} is damaged: {error}. Register {folder / 'adapter'} by itself.") from error
    assert isinstance(summary, dict)
    return summary


def _sources(note: dict[str, Any], places: dict[str, str]) -> dict[str, Source]:
    """Role -> rows, as the recipe names them; `places` are whole paths, where the run kept them."""
    recipe = note.get("recipe") or {}
    digests, settings = recipe.get("data_digests") or {}, recipe.get("data") or {}
    given = {"train": settings.get("path"), "eval": settings.get("eval_path")} | places
    # A limit takes a share of the file, whose digest is that of no data set; people are looked for in all of it.
    whole = {"train": settings.get("limit") is None, "eval": True}
    return {
        role: Source(place, digest if whole[role] else None)
        for role, digest in digests.items()
        if (place := given.get(role)) is not None
    }


def _named_data(registry: Registry, data: dict[str, Source], owner: str, actor: str) -> list[tuple[str, str]]:
    """Return (NAME:VERSION, role) of all data of a run; what the registry does not know is added, once all of it was checked."""
    known = {role: _known(registry, source) for role, source in data.items()}
    for role, source in data.items():
        if known[role] is None:
            _check_rows(source)
    return [(known[role] or _added(registry, source, owner, actor), role) for role, source in data.items()]


def _known(registry: Registry, source: Source) -> str | None:
    """The data set version with these rows, whoever added it first."""
    if source.digest is None:
        return None
    with registry.database.reading() as session:
        found = find_content(session, source.digest)
        return data_name(found[0]) if found else None


def _added(registry: Registry, source: Source, owner: str, actor: str) -> str:
    name = Path(source.location).stem if Path(source.location).exists() else source.location.partition(":")[0]
    with registry.database.reading() as session:
        used = select(DatasetVersion.location).join(Dataset)
        places = set(session.scalars(used.where(Dataset.name == name)))
        if places and source.location not in places:
            # Another file of the same name, whose terms are not known to be these.
            name = f"{name}-{source.digest[:8]}" if source.digest else f"{name}-{len(places) + 1}"
        is_new = session.scalar(select(Dataset.id).filter_by(name=name)) is None
    added = add_data(registry.database, name, source.location, Terms(owner=owner if is_new else None), actor=actor)
    return f"{added.name}:{added.version}"


def _check_rows(source: Source) -> None:
    path = Path(source.location)
    if source.digest is None or not path.is_file():
        return
    found = digest_rows(stream_rows(path), source.location)
    if found != source.digest:
        raise DataError(
            f"{path} does not hold the rows that were trained on: its digest is {found[:16]}, the run's {source.digest[:16]}. "
            "Restore the file, or name the data set with --data."
        )
