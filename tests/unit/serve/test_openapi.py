"""The OpenAPI document is exact: schemathesis asks the running server what the document allows, and what it forbids.

Run as its users run it, in a process of its own, with all its checks but one. `positive_data_acceptance` is off: a schema cannot
say that the prompt has to fit into the context, that a grammar has to be one, or which versions may be promoted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tests.gateway_scene import ScriptedBackend
from tests.registry_rows import add_base, key_for, ready_version, surface_for, tenant_for
from tests.serve_scene import gateway_over, serving

from luthier.models.pooling import Pooling
from luthier.registry.place import open_registry
from luthier.registry.promotion import promote
from luthier.registry.tenancy import Scope
from luthier.serve.app import make_app
from luthier.serve.settings import ServeSettings
from luthier.serve.watched import watched_gateway

HOOKS = """
import schemathesis


@schemathesis.hook
def before_load_schema(context, raw):
    for name, part in raw["components"]["schemas"].items():
        if name in BODIES:
            narrowed(part["properties"])
    raw["paths"]["/v1/models/{name}"]["get"]["parameters"][0]["schema"] = {"enum": NAMES["model"]}


def narrowed(properties):
    for name, schema in properties.items():
        if name in NAMES:
            properties[name] = {"enum": NAMES[name] + [None] * (schema.get("type") != "string")}
        if name in ("prompt", "input"):
            only_known_tokens(schema)
        for kind in schema.get("anyOf", []) if name in MOST else ():
            if kind.get("type") == "integer":
                kind["maximum"] = MOST[name]


def only_known_tokens(schema):
    for each in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        only_known_tokens(each)
    if isinstance(schema, dict) and schema.get("type") == "integer":
        schema["exclusiveMaximum"] = VOCABULARY
"""
"""Names that there are, and one that there is not, so that requests get further than 404; and few tokens, so that they end."""


def ask(url, key, folder, names, vocabulary, *options):
    """Run schemathesis against a server; fail with what it says if it finds a fault."""
    narrow = {
        "NAMES": names,
        "VOCABULARY": vocabulary,
        "MOST": {"n": 2, "best_of": 2, "max_tokens": 6, "max_completion_tokens": 6},
        "BODIES": [
            "ChatBody",
            "CompletionBody",
            "EmbeddingBody",
            "AdapterBody",
            "Promotion",
            "Rollback",
            "Word",
            "Hold",
            "Release",
            "Stop",
        ],
    }
    folder.mkdir()
    (folder / "asked_hooks.py").write_text("".join(f"{name} = {value!r}\n" for name, value in narrow.items()) + HOOKS)
    found = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json"),
            *("--header", f"Authorization: Bearer {key}"),
            *("--checks", "all", "--exclude-checks", "positive_data_acceptance"),
            *("--phases", "examples,coverage,fuzzing", "--max-examples", "20", "--seed", "8", "--generation-database", "none"),
            *("--request-timeout", "30", "--workers", "1", "--no-color", *options),
        ],
        cwd=folder,
        env=os.environ | {"SCHEMATHESIS_HOOKS": "asked_hooks", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


@pytest.fixture(scope="module")
def pooled(tiny_base, tiny_tokenizer, tmp_path_factory):
    """A gateway over a model that says how it pools."""
    folder = tmp_path_factory.mktemp("adapters")
    with gateway_over(
        tiny_base, tiny_tokenizer, folder, adapters=("alpha",), pooling=Pooling("mean", True), default_max_tokens=6
    ) as running:
        yield running


@pytest.fixture(scope="module")
def governed(tiny_tokenizer, tmp_path_factory):
    """A gateway over a registry with a surface and two versions, and the key of a tenant that may do everything."""
    folder = tmp_path_factory.mktemp("governed")
    registry = open_registry(folder / "registry", create=True)
    add_base(registry)
    surface_for(registry)
    for _ in range(2):
        ready_version(registry)
    promote(registry, "orders:1", "shop", actor="dan")
    tenant_for(registry, "acme", ("adapter", "orders"), ("surface", "shop"))
    key = key_for(registry, "acme", "all", *Scope)
    settings = ServeSettings(served_name="base", state=folder / "state", docs=True)
    with serving(make_app(watched_gateway(settings, ScriptedBackend(), tiny_tokenizer, registry))) as url:
        yield url, key
    registry.database.engine.dispose()


def test_schemathesis_finds_no_fault_in_openais_routes(pooled, tmp_path):
    names = {"model": ["tiny", "alpha", "no-such-model"]}
    vocabulary = pooled.engine.tokenizer.vocab_size
    ask(pooled.url, pooled.key, tmp_path / "asked", names, vocabulary, "--include-path-regex", "^/v1/")
    assert pooled.engine.closed_because is None


def test_schemathesis_finds_no_fault_in_the_other_routes(governed, tmp_path):
    """Draining comes last: it works, and nothing is taken after it."""
    url, key = governed
    versions = ["orders:1", "orders:2", "orders:3", "secrets:1"]
    names = {"model": ["base", "shop"], "surface": ["shop", "vault"], "version": versions, "adapter": ["orders", *versions]}
    others = ("--include-path-regex", "^/(admin|health|v1/feedback|v1/models)", "--exclude-path", "/admin/drain")
    ask(url, key, tmp_path / "asked", names, 100, *others)
    assert httpx.get(f"{url}/health/ready").status_code == 200
    ask(url, key, tmp_path / "drained", names, 100, "--include-path", "/admin/drain")
    assert httpx.get(f"{url}/health/ready").status_code == 503


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
