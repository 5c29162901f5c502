"""POST /v1/embeddings: vectors of texts, where the base says how its hidden states become one."""

import base64
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from luthier.serve.answers import unless_left
from luthier.serve.bodies import Body
from luthier.serve.completions import Input, ids_of
from luthier.serve.errors import ApiError
from luthier.serve.generating import Head, room_for, routed
from luthier.serve.routing import CallerOf, GatewayOf, KeyFirstRoute, refusals

router = APIRouter(route_class=KeyFirstRoute)


class EmbeddingBody(Body):
    """Texts whose vectors are wanted."""

    model: str = Field(min_length=1, max_length=512, description="an adapter, an alias, a surface, or the base; see /v1/models")
    input: Input
    encoding_format: Literal["float", "base64"] | None = Field(default=None, description="float where it is not given")
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        default=None, description="the vectors' own width: no model says in its files that its vectors may be cut"
    )
    user: str | None = Field(default=None, description="who asks, for sharing out a surface's experiment")


class Embedding(BaseModel):
    """One vector: numbers, or their float32 bytes (little-endian) in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """What a request took."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """A vector for each text, in their order."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@router.post("/v1/embeddings", response_model=EmbeddingList, responses=refusals(404, 409, 413))
async def embed(body: EmbeddingBody, request: Request, caller: CallerOf, gateway: GatewayOf) -> Response:
    """Return the vectors of texts."""
    route = routed(gateway, caller, request, body.model, body.user)
    head = Head.of("emb", gateway, route)
    rows = await ids_of(gateway.prompts, body.input)
    room_for(None, 1, rows, await gateway.backend.room() + 1, "input")  # nothing is added to them
    vectors = await unless_left(request.receive, gateway.embed(caller, route, rows, request_id=head.id))
    width = len(vectors[0])
    if body.dimensions not in (None, width):
        raise ApiError(
            400,
            f"dimensions={body.dimensions} is not supported: this model's vectors have {width} numbers, and nothing in its files "
            "says that they may be cut.",
            param="dimensions",
            code="unsupported_parameter",
        )
    tokens = sum(map(len, rows))
    answer = EmbeddingList(
        data=[
            Embedding(index=index, embedding=_packed(each) if body.encoding_format == "base64" else each)
            for index, each in enumerate(vectors)
        ],
        model=route.model,
        usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
    )
    return JSONResponse(answer.model_dump(), headers=head.headers)


def _packed(vector: list[float]) -> str:
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
