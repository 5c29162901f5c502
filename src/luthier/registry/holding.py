"""Which servers hold which versions in memory, so that it is known when nobody does any more.

A server notes a version before it reads it, and tells from time to time what it still holds. A deployment that has ended is
acknowledged once no server holds its version: an erasure waits for that. A server that has not been heard of for `LOST` counts as
gone: one that was killed holds nothing, and one that is cut off from the registry has stopped answering long before.
"""

from collections.abc import Collection
from datetime import timedelta

from sqlalchemy import delete, exists, select, update

from luthier.registry.columns import now
from luthier.registry.database import Database, add_if_absent
from luthier.registry.schema import Deployment
from luthier.registry.schema_serving import Holding

LOST = timedelta(minutes=15)


def note_holding(database: Database, server: str, version_id: int) -> None:
    """Note that a server is about to read a version."""
    with database.writing() as session:
        add_if_absent(session, Holding, server=server, version_id=version_id, seen_at=now())


def tell_holdings(database: Database, server: str, version_ids: Collection[int]) -> list[int]:
    """Say what a server holds now, and nothing else; return the deployments that are acknowledged by it."""
    moment = now()
    with database.writing() as session:
        session.execute(delete(Holding).where(Holding.server == server, Holding.version_id.not_in(list(version_ids))))
        session.execute(update(Holding).where(Holding.server == server).values(seen_at=moment))
        held = exists().where(Holding.version_id == Deployment.version_id, Holding.seen_at > moment - LOST)
        waiting = select(Deployment).where(Deployment.ended_at.is_not(None), Deployment.acknowledged_at.is_(None), ~held)
        gone = list(session.scalars(waiting.order_by(Deployment.id)))
        for deployment in gone:
            deployment.acknowledged_at = moment
        return [deployment.id for deployment in gone]
