"""The two ways into the database."""

from sqlalchemy import func, select

from luthier.registry.audit import record
from luthier.registry.database import open_database
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


def test_a_postgresql_that_vanishes_is_noticed_and_the_url_goes_before(postgres_url: str) -> None:
    engine = open_database(f"{postgres_url}&connect_timeout=3").engine
    with engine.connect() as connection:
        told = connection.connection.dbapi_connection.info.get_parameters()  # type: ignore[union-attr]
    engine.dispose()
    assert (told["connect_timeout"], told["tcp_user_timeout"], told["keepalives_count"]) == ("3", "30000", "3")
