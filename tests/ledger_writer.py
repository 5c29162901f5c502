"""Writes usage into a ledger until it is killed, and says which lines it wrote: python ledger_writer.py REGISTRY FOLDER LIFE."""

import asyncio
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from luthier.registry.place import open_registry
from luthier.serve.books import RegistryBooks
from luthier.serve.ledger import Answered, Ledger


async def write(place: str, folder: Path, life: str) -> None:
    """Record one answer after the other, with pauses in which they are sent."""
    ledger = Ledger(folder, RegistryBooks(open_registry(place).database, "writer"), send_seconds=0.02)
    await ledger.start()
    for number in range(10**9):
        answer = Answered(
            request_id=f"{life}-{number}",
            tenant_id=1,
            key_id=1,
            version_id=None,
            model="base",
            surface_id=None,
            experiment_id=None,
            epoch=None,
            unit_digest=None,
            prompt_tokens=number % 7,
            cached_tokens=0,
            completion_tokens=3,
            status="stop",
            finished_at=datetime.now(UTC),
        )
        ledger.record(answer)
        os.write(1, f"{answer.request_id} {answer.tokens}\n".encode())  # as a client that was answered knows it
        if number % 20 == 0:
            await asyncio.sleep(0.001)


if __name__ == "__main__":
    asyncio.run(write(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
