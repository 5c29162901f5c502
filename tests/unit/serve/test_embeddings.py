"""/v1/embeddings through OpenAI's own client against the engine, whose vectors are compared with transformers' elsewhere."""

import openai
import pytest
from tests.serve_scene import gateway_over

from luthier.models.pooling import Pooling


@pytest.fixture(scope="module")
def pooled(tiny_base, tiny_tokenizer, tmp_path_factory):
    """A gateway over a model that says how it pools, and OpenAI's client for it."""
    folder = tmp_path_factory.mktemp("adapters")
    with (
        gateway_over(tiny_base, tiny_tokenizer, folder, adapters=("alpha",), pooling=Pooling("mean", True)) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key=running.key, max_retries=0) as client,
    ):
        yield running, client


TEXTS = ["A loose brace buzzes;", "a sharp fret bites"]


def test_vectors_of_texts_and_token_ids_in_both_encodings(pooled):
    running, client = pooled
    ids = [running.gateway.tokenizer(text)["input_ids"] for text in TEXTS]
    for model in ("tiny", "alpha"):
        for given in (TEXTS, ids):
            packed = client.embeddings.create(model=model, input=given)  # the client asks for base64 by itself
            plain = client.embeddings.create(model=model, input=given, encoding_format="float")
            wanted = running.engine.embed(ids, adapter=None if model == "tiny" else model)
            for row, (short, long) in enumerate(zip(packed.data, plain.data, strict=True)):
                assert short.index == long.index == row
                assert long.embedding == pytest.approx(wanted[row], abs=1e-6)
                assert short.embedding == pytest.approx(wanted[row], abs=1e-6)
            assert plain.usage.prompt_tokens == plain.usage.total_tokens == sum(map(len, ids))
    assert client.embeddings.create(model="tiny", input=TEXTS[0]).data[0].embedding == pytest.approx(
        client.embeddings.create(model="tiny", input=ids[0]).data[0].embedding
    )


def test_dimensions_are_the_vectors_own(pooled):
    _, client = pooled
    width = len(client.embeddings.create(model="tiny", input="x").data[0].embedding)
    assert len(client.embeddings.create(model="tiny", input="x", dimensions=width).data[0].embedding) == width
    with pytest.raises(openai.BadRequestError, match=f"have {width} numbers"):
        client.embeddings.create(model="tiny", input="x", dimensions=width - 1)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "empty"),
        ({"input": "lute " * 2000}, "room for"),
        ({"input": [9999]}, "token 9999"),
    ],
)
def test_inputs_without_a_vector(pooled, body, told):
    _, client = pooled
    with pytest.raises(openai.BadRequestError, match=told):
        client.embeddings.create(**{"model": "tiny"} | body)


def test_a_model_that_does_not_say_how_it_pools_says_that(client):
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model="tiny", input="x")
