"""The two ways into the database."""

from sqlalchemy import func, select

from luthier.registry.audit import record
from luthier.registry.place import Registry
from luthier.registry.schema import AuditEvent


def test_a_reader_sees_one_state_while_others_write(any_registry: Registry) -> None:
    number = select(func.count()).select_from(AuditEvent)
    with any_registry.database.reading() as session:
        assert session.scalar(number) == 0
        with any_registry.database.writing() as other:
            record(other, "ada", "version.register", "adapter/orders/1")
        assert session.scalar(number) == 0
    with any_registry.database.reading() as session:
        assert session.scalar(number) == 1
