"""Inside vLLM: adapters by NAME:VERSION, from the registry, whole and unchanged, or not at all.

vLLM finds `register` by its entry point (`vllm.general_plugins`, named `luthier`) and asks the resolver for every model name that
it does not know. Only a name in the registry's own grammar leads to a look into the registry; a path, a name of the Hub or
anything else is answered with None before anything is opened. A version is resolved (its bytes hashed; what is held, retired or
erased refused) and checked (checking.py) before vLLM reads it. A folder of the cache holds one version for good, so that vLLM's
prefix cache, which goes by name and path, never mixes two.

vLLM swallows what a resolver raises. The reason is kept here, and the routes (routes.py) tell it to the gateway.
This file is imported in every process of vLLM, and loads no torch.
"""

import asyncio
import logging
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

from luthier.core.errors import BaseMismatchError, LuthierError, ModelError, RegistryError, UnservableError
from luthier.registry.resolving import Resolved, resolve_version
from luthier.registry.versions import find_version
from luthier.serve.vllm.checking import RANKS, Served, check_for_vllm

log = logging.getLogger("vllm.luthier")

NAME = "luthier"
"""The plugin's name in VLLM_PLUGINS, and the resolver's."""

BASE_FILE = "LUTHIER_VLLM_BASE"
"""Environment: the file that says which base is served (`Served.write`)."""
MAX_RANK = "LUTHIER_VLLM_MAX_LORA_RANK"
"""Environment: vLLM's --max-lora-rank."""

_REFERENCE = re.compile(r"(?!.*(^|/)\.)[\w.-]+(/[\w.-]+)*:[1-9][0-9]{0,8}", re.ASCII)
KEPT = 1024
"""So many refusals are kept with their reasons."""


def register() -> None:
    """Give vLLM the resolver. Does nothing in a vLLM that luthier did not start, and nothing the second time."""
    if BASE_FILE not in os.environ:
        log.info("luthier's resolver stays out: %s is not set, so that nobody says which base is served", BASE_FILE)
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    if NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    try:
        LoRAResolverRegistry.register_resolver(NAME, RegistryResolver.from_environment())
    except ModelError as error:  # a worker on another machine, which resolves nothing; the server would refuse everything
        log.warning("luthier's resolver stays out: %s", error)


def is_reference(name: str) -> bool:
    """Return whether a name is NAME:VERSION with the version's number: no alias, no path, no place outside the registry."""
    return _REFERENCE.fullmatch(name) is not None


class RegistryResolver:
    """vLLM's LoRAResolver (its one method; vLLM asks for no more). `place` is a registry, None the default one."""

    def __init__(self, place: str | None, base: Served, max_rank: int):
        self.place, self.base, self.max_rank = place, base, max_rank
        self._refused: OrderedDict[str, LuthierError] = OrderedDict()
        self._registry: Any = None

    @classmethod
    def from_environment(cls) -> "RegistryResolver":
        """Return the resolver that the supervisor asks for in the environment. Raises: ModelError."""
        return cls(None, Served.read(os.environ[BASE_FILE]), int(os.environ.get(MAX_RANK, RANKS[-1])))

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Return vLLM's LoRARequest, or None; why it is None stands in the log and in `reason`."""
        if not is_reference(lora_name):
            return None
        try:
            found = await asyncio.to_thread(self.find, lora_name)
        except LuthierError as error:
            self._remember(lora_name, error)
            log.warning("adapter %s is refused: %s", lora_name, error)
            return None
        except Exception as error:  # vLLM would answer 500 to whoever asked
            self._remember(lora_name, RegistryError(f"the registry cannot be asked now ({type(error).__name__})"))
            log.exception("adapter %s cannot be resolved", lora_name)
            return None
        self._refused.pop(lora_name, None)
        from vllm.lora.request import LoRARequest

        return LoRARequest(lora_name, id_of(found), str(found.folder), base_model_name=base_model_name)

    def find(self, reference: str) -> Resolved:
        """Return a version on this machine that vLLM serves right. Reads files: not for an event loop.

        Raises: RegistryError, RefusedError, BlobError, StorageError, AdapterFormatError, BaseMismatchError, UnservableError.
        """
        if self._registry is None:
            from luthier.registry.place import open_registry

            self._registry = open_registry(self.place)
        resolved = resolve_version(self._registry, reference)
        with self._registry.database.reading() as session:
            row = find_version(session, reference).base_model
            trained_on = row.fingerprint if row is not None else None
        refuse_unfit(resolved.reference, resolved.folder, self.base, self.max_rank, trained_on=trained_on)
        return resolved

    def reason(self, reference: str) -> LuthierError | None:
        """Return why a reference was refused when it was last asked for."""
        return self._refused.get(reference)

    def _remember(self, reference: str, error: LuthierError) -> None:
        self._refused[reference] = error
        self._refused.move_to_end(reference)
        while len(self._refused) > KEPT:
            self._refused.popitem(last=False)


def refuse_unfit(name: str, folder: Path, base: Served, max_rank: int, **known: Any) -> None:
    """Raise BaseMismatchError or UnservableError, with all the reasons, for what `check_for_vllm` finds."""
    reasons = check_for_vllm(folder, base, max_rank, **known)
    if not reasons:
        return
    kind = BaseMismatchError if any("trained on another base" in reason for reason in reasons) else UnservableError
    raise kind(f"vLLM would not serve {name} right: " + "; ".join(reasons))


def id_of(found: Resolved) -> int:
    """Return the number of a version for vLLM: the same for the same bytes. (vLLM 0.32 counts by itself instead.)"""
    from luthier.formats.note import CONFIG_FILE, TENSOR_FILE, sha256

    digests = "".join(found.digests.get(name, "") for name in (CONFIG_FILE, TENSOR_FILE))
    return 1 + int(sha256(digests.encode())[:12], 16)
