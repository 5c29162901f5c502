"""Guardrails: experiments whose arms are worse than may be are stopped, by whichever server looks first."""

import logging
from typing import TYPE_CHECKING

from luthier.registry.feedback import watch_all
from luthier.serve.background import Repeating, Worker, is_away

if TYPE_CHECKING:
    from luthier.registry.place import Registry
    from luthier.serve.views import Views

log = logging.getLogger(__name__)
GUARD_SECONDS = 5.0


class Guard:
    """Looks at the running experiments of a registry every few seconds. `actor` is who stops them, in the record."""

    def __init__(self, registry: "Registry", views: "Views", actor: str, seconds: float = GUARD_SECONDS):
        self._registry, self._views, self._actor = registry, views, actor
        self._worker = Worker("guard")
        self._repeating = Repeating("looking at guardrails", seconds, self.look)

    def start(self) -> None:
        """Begin to look."""
        self._repeating.start()

    async def look(self) -> None:
        """Look once."""
        try:
            stopped = await self._worker.do(watch_all, self._registry.database, actor=self._actor)
        except Exception as error:
            if not is_away(error):
                raise
            return
        for surface, why in stopped.items():
            log.warning("the experiment on %s was stopped by its guardrail: %s", surface, why)
        if stopped:
            self._views.soon()

    async def close(self) -> None:
        """Look no more."""
        await self._repeating.close()
        self._worker.close()
