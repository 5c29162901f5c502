"""The OpenAPI document is exact: schemathesis asks the running server what the document allows, and what it forbids.

Run as its users run it, in a process of its own. Two checks are off. `positive_data_acceptance`: a schema cannot say that the
prompt has to fit into the context, or that a grammar has to be one. `unsupported_method` stays on; so does `ignored_auth`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tests.serve_scene import gateway_over

from luthier.models.pooling import Pooling

HOOKS = '''
import schemathesis

@schemathesis.hook
def before_load_schema(context, raw):
    """Names that there are, so that requests get further than 404; and few tokens, so that they end."""
    for body in ("ChatBody", "CompletionBody", "EmbeddingBody"):
        properties = raw["components"]["schemas"][body]["properties"]
        properties["model"] = {"enum": ["tiny", "alpha", "no-such-model"]}
        for name, most in (("n", 2), ("best_of", 2), ("max_tokens", 6), ("max_completion_tokens", 6)):
            for kind in properties.get(name, {}).get("anyOf", []):
                if kind.get("type") == "integer":
                    kind["maximum"] = most
        for name in ("prompt", "input"):
            only_known_tokens(properties.get(name))
    raw["paths"]["/v1/models/{name}"]["get"]["parameters"][0]["schema"] = {"enum": ["tiny", "alpha", "no-such-model"]}


def only_known_tokens(schema):
    for each in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        only_known_tokens(each)
    if isinstance(schema, dict) and schema.get("type") == "integer":
        schema["exclusiveMaximum"] = VOCABULARY
'''


@pytest.fixture(scope="module")
def pooled(tiny_base, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    with gateway_over(
        tiny_base, tiny_tokenizer, folder, adapters=("alpha",), pooling=Pooling("mean", True), default_max_tokens=6
    ) as running:
        yield running


def test_schemathesis_finds_no_fault(pooled, tmp_path):
    vocabulary = pooled.engine.tokenizer.vocab_size
    (tmp_path / "asked_hooks.py").write_text(f"VOCABULARY = {vocabulary}\n{HOOKS}")
    command = Path(sys.executable).with_name("schemathesis")
    found = subprocess.run(
        [
            *(str(command), "run", f"{pooled.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {pooled.key}"),
            *("--checks", "all", "--exclude-checks", "positive_data_acceptance"),
            *("--phases", "examples,coverage,fuzzing", "--max-examples", "25", "--seed", "8", "--generation-database", "none"),
            *("--request-timeout", "30", "--workers", "1", "--no-color"),
        ],
        cwd=tmp_path,
        env=os.environ | {"SCHEMATHESIS_HOOKS": "asked_hooks", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert pooled.engine.closed_because is None


def test_every_route_says_who_may_ask_and_what_may_come_back(pooled):
    document = httpx.get(f"{pooled.url}/openapi.json").json()
    assert "422" not in json.dumps(document)
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if not path.startswith("/v1/"):
                continue
            assert operation["security"] == [{"HTTPBearer": []}]
            for status in ("400", "401", "403", "429", "500", "503"):
                body = operation["responses"][status]["content"]["application/json"]["schema"]
                assert body == {"$ref": "#/components/schemas/ErrorBody"}
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(chat["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"404", "409", "413"} <= set(chat)


def test_the_document_is_there_only_where_it_was_asked_for(tiny_base, tiny_tokenizer, tmp_path):
    with gateway_over(tiny_base, tiny_tokenizer, tmp_path, docs=False) as running:
        for path in ("/openapi.json", "/docs", "/redoc"):
            assert httpx.get(f"{running.url}{path}").status_code == 404
