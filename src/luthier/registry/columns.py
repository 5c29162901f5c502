"""What the tables are made of: the common base with its names, moments in UTC, and the words that a column may hold."""

import enum
from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, DateTime, Enum, MetaData, String
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.types import TypeDecorator

# Named from the first day: Alembic cannot alter what has no name, and SQLite gives none of its own.
NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcTime(TypeDecorator[datetime]):
    """A moment in UTC. SQLite forgets the time zone, so it is put back when read; a naive time is refused when written."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the moment in UTC. Raises: ValueError for a time without a zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no time zone; the registry keeps moments in UTC")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value if value is None or value.tzinfo else value.replace(tzinfo=UTC)


class Lifecycle(enum.StrEnum):
    """What was decided about a version. Whether it is served is a question for the deployments."""

    CANDIDATE = "candidate"
    RETIRED = "retired"
    ERASED = "erased"


class DataState(enum.StrEnum):
    """Whether a data set version may be trained on."""

    ACTIVE = "active"
    FROZEN = "frozen"
    ERASED = "erased"


class Audience(enum.StrEnum):
    """Who sees what a surface answers; customers need the strictest rules."""

    CUSTOMER = "customer"
    INTERNAL = "internal"
    BATCH = "batch"


class Verdict(enum.StrEnum):
    """What the gate said."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


class BlobState(enum.StrEnum):
    """Where a blob stands between being written and being gone."""

    PRESENT = "present"
    DELETING = "deleting"
    GONE = "gone"


def now() -> datetime:
    """Return this moment in UTC."""
    return datetime.now(UTC)


def _named(kind: type[enum.StrEnum]) -> Enum:
    # Stored as text: a native enum type of PostgreSQL cannot lose a value again, a check of SQLite only by copying the table.
    def words(members: Any) -> list[str]:
        return [member.value for member in members]

    return Enum(kind, native_enum=False, length=32, validate_strings=True, values_callable=words)


class Row(DeclarativeBase):
    """What all tables share."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: String(255),
        dict[str, Any]: JSON,
        list[str]: JSON,
        datetime: UtcTime,
        Lifecycle: _named(Lifecycle),
        DataState: _named(DataState),
        Audience: _named(Audience),
        Verdict: _named(Verdict),
        BlobState: _named(BlobState),
    }
