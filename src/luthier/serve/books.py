"""What a gateway writes into the registry: usage and units that saw an arm, and which versions this server holds."""

import secrets
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from pathlib import Path

from luthier.core.atomic import write_atomic
from luthier.registry.database import Database
from luthier.registry.experiments import count_units
from luthier.registry.holding import note_holding, tell_holdings
from luthier.registry.usage import Usage, record_usage, tokens_on
from luthier.serve.ledger import Answered


class RegistryBooks:
    """The books of a ledger in the registry's tables. What was written is written once, however often it is told."""

    def __init__(self, database: Database, server: str):
        self._database, self._server = database, server

    def add(self, answers: Sequence[Answered]) -> None:
        """Add events, and count the units that saw an arm."""
        record_usage(self._database, [self._usage(answer) for answer in answers])
        seen: dict[tuple[int, int], dict[bytes, int]] = {}
        for answer in answers:
            if answer.unit_digest and answer.version_id is not None and answer.experiment_id and answer.epoch:
                units = seen.setdefault((answer.experiment_id, answer.epoch), {})
                units.setdefault(bytes.fromhex(answer.unit_digest), answer.version_id)
        for (experiment_id, epoch), units in seen.items():
            count_units(self._database, experiment_id, epoch, units)

    def tokens_of(self, day: date) -> Mapping[int, int]:
        """Return each tenant's tokens on a day."""
        with self._database.reading() as session:
            return tokens_on(session, day)

    def _usage(self, answer: Answered) -> Usage:
        return Usage(
            request_id=answer.request_id,
            tenant_id=answer.tenant_id,
            key_id=answer.key_id,
            model=answer.model,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            status=answer.status,
            gateway=self._server,
            finished_at=answer.finished_at,
            cached_tokens=answer.cached_tokens,
            version_id=answer.version_id,
            surface_id=answer.surface_id,
            experiment_id=answer.experiment_id,
            epoch=answer.epoch,
        )


class RegistryHoldings:
    """What one server holds, in the registry's tables."""

    def __init__(self, database: Database, server: str):
        self._database, self._server = database, server

    def hold(self, version_id: int) -> None:
        """Note that this server is about to hold a version."""
        note_holding(self._database, self._server, version_id)

    def tell(self, version_ids: Collection[int]) -> None:
        """Say what it holds now."""
        tell_holdings(self._database, self._server, version_ids)


def server_name(state: Path) -> str:
    """Return the name of the server whose state this is, drawn when it is first asked for. Raises: StorageError."""
    file = state / "server"
    if not file.exists():
        write_atomic(file, secrets.token_hex(8), mode=0o600)
    return file.read_text().strip()
