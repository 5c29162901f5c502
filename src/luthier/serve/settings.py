"""What a gateway is told when it starts."""

from pathlib import Path

from pydantic import Field

from luthier.core.settings import Settings


class ServeSettings(Settings):
    """How a gateway serves; the base model and the adapters are given beside it."""

    served_name: str = Field(description="the name of the bare base in requests and in the list of models")
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0: any that is free")
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024, description="a larger request body is refused with 413")
    max_waiting: int = Field(default=256, ge=1, description="requests under way at once; one more is answered 429")
    refresh_seconds: float = Field(default=1.0, gt=0, description="how often the registry is asked for changes")
    stale_seconds: float = Field(
        default=300.0, gt=0, description="how long the last known keys and routes count while the registry is away"
    )
    drain_seconds: float = Field(default=30.0, ge=0, description="how long running answers may go on after a stop is asked for")
    state: Path | None = Field(
        default=None, description="folder for what has to outlive the process: usage that is not in the registry yet"
    )
    log_prompts: bool = Field(default=False, description="write prompts and answers into the log; off, they are nowhere")
    docs: bool = Field(default=False, description="answer /docs and /openapi.json, which tell what there is to call")
