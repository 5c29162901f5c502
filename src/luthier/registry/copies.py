"""Places outside the store where bytes of a version or a data set lie, noted so that an erasure finds them."""

from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.registry.schema import CopyElsewhere

KINDS = ("run", "cache", "tracker", "export", "merged", "data")
RUN_FILE = "run.jsonl"


def note_copy(session: Session, kind: str, location: str, *, version_id: int | None = None, data_id: int | None = None) -> None:
    """Note a place, unless it is known already."""
    where = {"version_id": version_id, "dataset_version_id": data_id, "location": location}
    if session.scalar(select(CopyElsewhere.id).filter_by(**where).limit(1)) is None:
        session.add(CopyElsewhere(kind=kind, **where))
        session.flush()


def run_of(folder: Path) -> str:
    """Return the folder of the run that wrote an adapter's folder (it has checkpoints and a log), or that folder itself."""
    folder = folder.absolute()
    return str(folder.parent if (folder.parent / RUN_FILE).is_file() else folder)
