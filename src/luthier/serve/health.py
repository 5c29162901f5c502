"""GET /health/live and /health/ready: for whoever starts servers and shares out requests. Without a key, and telling no names."""

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from luthier.serve.gateway import Gateway

router = APIRouter(tags=["health"])


class Live(BaseModel):
    """The process answers."""

    status: Literal["live"] = "live"


class Ready(BaseModel):
    """Whether requests should be sent here now."""

    status: Literal["ready", "not ready"]
    reasons: list[str] = Field(description="why not")


@router.get("/health/live")
async def live() -> Live:
    """Say that the process answers; one that does not should be started again."""
    return Live()


@router.get("/health/ready", responses={503: {"model": Ready}})
async def ready(request: Request, response: Response) -> Ready:
    """Say whether requests should be sent here; 503 with the reasons where they should not."""
    gateway: Gateway = request.app.state.gateway
    reasons = await gateway.unready_because()
    response.status_code = 503 if reasons else 200
    response.headers["Cache-Control"] = "no-store"
    return Ready(status="not ready" if reasons else "ready", reasons=reasons)
