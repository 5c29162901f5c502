"""POST /v1/feedback: what a client says of an answer it got, as the guardrail of an experiment hears it."""

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from luthier.registry.feedback import LONGEST_METRIC, give_feedback
from luthier.serve.bodies import Body
from luthier.serve.governance import registry_of
from luthier.serve.routing import CallerOf, GatewayOf, KeyFirstRoute, refusals

router = APIRouter(route_class=KeyFirstRoute, tags=["feedback"])


class FeedbackBody(Body):
    """A word on an answer."""

    completion_id: str = Field(min_length=1, max_length=255, description="the id of the answer")
    metric: str = Field(min_length=1, max_length=LONGEST_METRIC, description="what is said of it, as an experiment names it")
    value: float = Field(allow_inf_nan=False, description="how much of it")


class FeedbackKept(BaseModel):
    """It was kept."""

    object: Literal["feedback"] = "feedback"
    completion_id: str
    metric: str
    value: float


@router.post("/v1/feedback", responses=refusals(404))
async def feedback(body: FeedbackBody, caller: CallerOf, gateway: GatewayOf) -> FeedbackKept:
    """Keep a word on an answer that this tenant got; a later one on the same metric replaces it.

    Of an answer that is not this tenant's it is kept as well, and counts for nothing.
    """
    permit = gateway.limits.enter(caller, 0)  # it counts as a request, so that nobody fills the registry with words
    try:

        def keep(registry: Any) -> None:
            with registry.database.writing() as session:
                give_feedback(
                    session,
                    body.completion_id,
                    body.metric,
                    body.value,
                    tenant_id=caller.tenant_id,
                    key_id=caller.key_id,
                )

        await registry_of(gateway).ask(keep)
    finally:
        permit.settle(0)
    return FeedbackKept(completion_id=body.completion_id, metric=body.metric, value=body.value)
