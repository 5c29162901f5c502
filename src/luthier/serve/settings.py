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
    default_max_tokens: int = Field(
        default=1024, ge=1, description="a chat's answer is cut off after so many tokens where the request names no limit"
    )
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


class EngineSettings(Settings):
    """The embedded engine behind a gateway: what is loaded, and what it may have in hand. Plain data, to be sent to a process."""

    model: str = Field(description="base model, as `luthier train` takes it")
    dtype: str = Field(default="auto", description="of the base weights: auto, bfloat16, float32 or float16")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:<number>")
    quantize: str = Field(default="none", description="nf4: the base's linear layers in 4 bits; none: as they are")
    form: str | None = Field(default=None, description="of the weights in memory; None: nf4 for a base in 4 bits, else float")
    max_running: int = Field(default=32, ge=1, description="requests that are answered at a time")
    max_queue: int = Field(default=1024, ge=1, description="requests that wait in the engine")
    max_active_adapters: int = Field(default=8, ge=1, description="different adapters in one step")
    kv_tokens: int | None = Field(
        default=None, ge=1, description="tokens of all running requests together; None: what fits into 1 GiB"
    )
    prefix_cache: bool = Field(default=True, description="keep what prompts have in common")
    adapter_bytes: int = Field(default=2**30, ge=1, description="memory for adapters")
    adapters: dict[str, str] = Field(default={}, description="folders of adapters by name")
    registry: str | None = Field(default=None, description="where other references are looked up; None: nowhere")

    @property
    def form_held(self) -> str:
        """The form that the weights are held in."""
        return self.form or ("nf4" if self.quantize == "nf4" else "float")
