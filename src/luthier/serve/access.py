"""The registry for routes: off the event loop, with its refusals as answers."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from luthier.core.errors import LuthierError, RefusedError, RegistryError
from luthier.serve.background import Worker, is_away
from luthier.serve.errors import ApiError, unavailable

if TYPE_CHECKING:
    from luthier.registry.place import Registry

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class RegistryAccess:
    """Asks the registry one thing at a time, in a thread."""

    def __init__(self, registry: "Registry"):
        self._registry = registry
        self._worker = Worker("registry")

    async def ask(self, act: "Callable[[Registry], Result]") -> Result:
        """Return what `act` returns. Raises: ApiError 404 for what is not there, 409 for what a rule forbids, 400, 503."""
        try:
            return await self._worker.do(act, self._registry)
        except RefusedError as error:
            raise ApiError(409, str(error), code="refused") from error
        except RegistryError as error:
            raise ApiError(404, str(error), code="not_found") from error
        except LuthierError as error:
            raise ApiError(400, str(error), code="invalid_value") from error
        except Exception as error:
            if not is_away(error):
                raise
            log.warning("a request to the registry failed: %s", error)
            raise unavailable("The registry is out of reach. Try again later.", 5) from error

    def close(self) -> None:
        """Take nothing more."""
        self._worker.close()
