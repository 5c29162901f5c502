"""Routes inside vLLM, in the place of its own of the same names: load and unload by NAME:VERSION only, and tell why not.

    POST /v1/load_lora_adapter    {"lora_name"}   vLLM's own takes any path of the machine and any name of the Hub
    POST /v1/unload_lora_adapter  {"lora_name"}   vLLM's own forgets the name and keeps the numbers in memory
    GET  /v1/luthier                              what is served, and on what

vLLM finds `Endpoints` by its entry point (`vllm.endpoint_plugins`) where VLLM_PLUGINS names `luthier`.
"""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from luthier.core.errors import LuthierError
from luthier.formats.note import TENSOR_FILE
from luthier.serve.vllm.plugin import NAME


class AdapterName(BaseModel):
    """Which adapter is meant."""

    lora_name: str


class Endpoints:
    """vLLM's EndpointPlugin."""

    name = NAME
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._client: Any = None
        self._models: Any = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.add_api_route("/v1/load_lora_adapter", self.load, methods=["POST"])
        app.add_api_route("/v1/unload_lora_adapter", self.unload, methods=["POST"])
        app.add_api_route("/v1/luthier", self.show, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep hold of what the routes work with."""
        self._client, self._models = engine_client, state.openai_serving_models

    async def load(self, asked: AdapterName) -> JSONResponse:
        """Resolve an adapter and read it into memory; 409 with the error's class and its words where it is refused."""
        from vllm.lora.request import LoRARequest
        from vllm.lora.resolver import LoRAResolverRegistry

        found = await self._models.resolve_lora(asked.lora_name)
        if isinstance(found, LoRARequest):
            size = (Path(found.lora_path) / TENSOR_FILE).stat().st_size
            return JSONResponse({"lora_name": asked.lora_name, "bytes": size})
        reason: LuthierError | None = LoRAResolverRegistry.get_resolver(NAME).reason(asked.lora_name)
        kind = type(reason).__name__ if reason is not None else "AdapterError"
        words = str(reason) if reason is not None else f"vLLM could not read adapter '{asked.lora_name}'; its log says why"
        return JSONResponse({"error": {"type": kind, "message": words}}, 409)

    async def unload(self, asked: AdapterName) -> JSONResponse:
        """Forget an adapter and its numbers. One that is not there is none to be forgotten."""
        async with self._models.lora_resolver_lock[asked.lora_name]:
            known = self._models.lora_requests.pop(asked.lora_name, None)
            if known is not None:
                await self._client.remove_lora(known.lora_int_id)
        self._models.lora_resolver_lock.pop(asked.lora_name, None)
        return JSONResponse({"lora_name": asked.lora_name, "was_there": known is not None})

    async def show(self) -> JSONResponse:
        """Say on what device the model runs, and which adapters are known."""
        from vllm.platforms import current_platform

        names = sorted(self._models.lora_requests)
        return JSONResponse({"device": current_platform.device_type, "adapters": names})
