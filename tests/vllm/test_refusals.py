"""What the plugin refuses, and that the reason reaches the gateway. Each kind is real, registered, and asked of a real vLLM."""

import httpx
import pytest
from tests.unfit_adapters import KINDS

from luthier.core.errors import AdapterError, BaseMismatchError, ConfigError, LuthierError, RefusedError
from luthier.engine.requests import Sampling
from luthier.registry.schema import AdapterVersion
from luthier.registry.versions import find_version


def known(vllm) -> list[str]:
    return vllm.call(vllm.backend.supervisor.client.get("/v1/luthier")).json()["adapters"]


def resident(vllm) -> set[str]:
    told = vllm.call(vllm.backend.stats())["adapters"]
    found = {each["name"] for each in told["adapters"] if each["state"] == "resident"}
    assert told["resident_bytes"] == sum(each["bytes"] for each in told["adapters"] if each["name"] in found)
    return found


def post(vllm, path: str, **body) -> httpx.Response:
    return vllm.call(vllm.backend.supervisor.client.post(path, json=body))


@pytest.mark.parametrize("kind", KINDS)
def test_what_vllm_would_serve_wrongly_is_refused_with_the_reason(kind, scene, vllm):
    name = f"acme/{kind}:1"
    with pytest.raises(AdapterError) as refused:
        vllm.call(vllm.backend.load(name))
    assert scene.unfit[name] in str(refused.value)
    assert (type(refused.value) is BaseMismatchError) == (kind == "other_base")
    with pytest.raises(AdapterError):
        vllm.answer(scene.prompts[0], name, Sampling(max_new_tokens=2))
    assert name not in known(vllm)


def test_vllm_asked_directly_refuses_it_too(scene, vllm):
    refused = post(vllm, "/v1/completions", model="acme/dora:1", prompt=[5, 6], max_tokens=2)
    assert refused.status_code == 404


def test_a_version_that_is_held_is_refused(scene, vllm):
    name = scene.adapters[-1]
    vllm.call(vllm.backend.unload(name))
    with scene.registry.database.writing() as session:
        held = find_version(session, name).id
        session.get_one(AdapterVersion, held).hold_reason = "a complaint"
    try:
        with pytest.raises(RefusedError, match="a complaint"):
            vllm.answer(scene.prompts[0], name, Sampling(max_new_tokens=2))
    finally:
        with scene.registry.database.writing() as session:
            session.get_one(AdapterVersion, held).hold_reason = None
    assert vllm.answer(scene.prompts[0], name, scene.sampling).token_ids == scene.wanted[name, scene.prompts[0]].token_ids


@pytest.mark.parametrize("name", ["acme/none:1", "acme/trained:9", "acme/trained", "acme/trained:latest"])
def test_what_is_not_registered_is_not_there(name, scene, vllm):
    with pytest.raises(LuthierError):
        vllm.call(vllm.backend.load(name))
    assert post(vllm, "/v1/completions", model=name, prompt=[5, 6], max_tokens=2).status_code == 404


def test_no_path_and_no_name_of_the_hub_leads_anywhere(scene, vllm):
    vllm.call(vllm.backend.load("acme/trained:1"))
    folder = next(scene.registry.cache.glob("acme/trained/*"))
    names = [str(folder), f"../..{folder}", f"{folder}:1", "~/adapters", "org/model", "file:///etc/passwd", "..", ".:1", ""]
    before = known(vllm)
    for name in names:
        bodies = [{"lora_name": name}, *({"lora_name": each, "lora_path": str(folder)} for each in (name, "x:1"))]
        for body in bodies:
            assert post(vllm, "/v1/load_lora_adapter", **body).status_code == 409
        if name:
            assert post(vllm, "/v1/completions", model=name, prompt=[5, 6], max_tokens=2).status_code == 404
    assert known(vllm) == before


def test_an_adapter_that_is_let_go_is_read_again_when_it_is_asked_for(scene, vllm):
    name, prompt = scene.adapters[1], scene.prompts[1]
    vllm.call(vllm.backend.load(name))
    assert name in known(vllm) and name in resident(vllm)
    vllm.call(vllm.backend.unload(name))
    assert name not in known(vllm) and name not in resident(vllm)
    vllm.call(vllm.backend.unload(name))  # once more is no error
    assert vllm.answer(prompt, name, scene.sampling).token_ids == scene.wanted[name, prompt].token_ids


def test_embeddings_are_refused(vllm):
    with pytest.raises(ConfigError, match="no embeddings"):
        vllm.call(vllm.backend.embed([(1, 2)], None))


def test_a_request_that_is_too_long_is_the_callers_fault(scene, vllm):
    with pytest.raises(ValueError, match="256"):
        vllm.answer([5] * 300, None, Sampling(max_new_tokens=5))
