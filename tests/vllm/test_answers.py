"""vLLM answers as luthier's own engine does: the same tokens, whoever else is in the batch."""

import asyncio
import json

import pytest
from tests.vllm.conftest import TOKENS

from luthier.engine.requests import Constraint, Sampling
from luthier.serve.vllm.command import RAW_BASE

ALL_TOKENS = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def check(found, wanted) -> None:
    """Compare with what the embedded engine answered."""
    assert found.token_ids == wanted.token_ids
    assert (found.text, found.finish_reason, found.prompt_tokens) == (wanted.text, wanted.finish_reason, wanted.prompt_tokens)
    for here, there in zip(found.logprobs, wanted.logprobs, strict=True):
        assert here.logprob == pytest.approx(there.logprob, abs=1e-3)
        assert [each for each, _ in here.alternatives] == [each for each, _ in there.alternatives]


def test_the_adapters_answer_otherwise_than_the_base(scene):
    """Without this the tests below would prove nothing."""
    assert {len(answer.token_ids) for answer in scene.wanted.values()} == {TOKENS}
    for name in scene.adapters:
        assert any(scene.wanted[name, prompt].token_ids != scene.wanted[None, prompt].token_ids for prompt in scene.prompts)


def test_an_adapter_answers_the_same_16_tokens(scene, vllm):
    for name in (None, *scene.adapters):
        for prompt in scene.prompts:
            check(vllm.answer(prompt, name, scene.sampling), scene.wanted[name, prompt])


def test_rows_of_base_and_adapters_together_answer_as_alone(scene, vllm):
    """vLLM 0.32 gives rows of the bare base another adapter's numbers on a CPU; asked as it is here, it does not."""
    asked = [(prompt, name) for prompt in scene.prompts for name in (None, *scene.adapters[:3], None)]
    for (prompt, name), found in zip(asked, vllm.answers(asked, scene.sampling), strict=True):
        check(found, scene.wanted[name, prompt])


def test_without_the_zero_adapter_rows_of_the_base_would_be_wrong(scene, vllm):
    """What the test above would find: rows of the base by vLLM's own name, among rows of adapters.

    Where this fails, vLLM has been mended (vllm#48421), and the zero adapter may go.
    """

    async def ask(model, prompt):
        body = {"model": model, "prompt": list(prompt), **ALL_TOKENS}
        told = await vllm.backend.supervisor.client.post("/v1/completions", json=body)
        return tuple(told.json()["choices"][0]["token_ids"])

    async def together():
        rows = [(model, prompt) for prompt in scene.prompts for model in (RAW_BASE, *scene.adapters[:3])]
        return rows, await asyncio.gather(*(ask(*row) for row in rows))

    rows, found = vllm.call(together())
    answers = [
        (scene.wanted[None, prompt].token_ids, ids) for (model, prompt), ids in zip(rows, found, strict=True) if model == RAW_BASE
    ]
    assert any(ids != wanted for wanted, ids in answers)


def test_more_adapters_than_slots_take_turns(scene, vllm):
    asked = [(prompt, name) for name in (*scene.adapters, None) for prompt in scene.prompts]
    for (prompt, name), found in zip(asked, vllm.answers(asked, scene.sampling), strict=True):
        check(found, scene.wanted[name, prompt])


def test_the_socket_itself_gives_the_same_tokens(scene, vllm):
    """Without the backend: vLLM resolves the name through the plugin when it is first asked for it."""
    name, prompt = scene.adapters[0], scene.prompts[0]
    vllm.call(vllm.backend.unload(name))
    body = {"model": name, "prompt": list(prompt), **ALL_TOKENS}
    told = vllm.call(vllm.backend.supervisor.client.post("/v1/completions", json=body)).json()
    assert tuple(told["choices"][0]["token_ids"]) == scene.wanted[name, prompt].token_ids


def test_the_bare_base_by_vllms_own_name_is_what_the_zero_adapter_answers(scene, vllm):
    body = {"model": RAW_BASE, "prompt": list(scene.prompts[0]), **ALL_TOKENS}
    told = vllm.call(vllm.backend.supervisor.client.post("/v1/completions", json=body)).json()
    assert tuple(told["choices"][0]["token_ids"]) == scene.wanted[None, scene.prompts[0]].token_ids


def test_there_is_as_much_room_as_the_model_has(vllm):
    assert vllm.call(vllm.backend.room()) == 256


def test_stop_texts_and_stop_tokens_end_an_answer(scene, vllm):
    wanted = scene.wanted[None, scene.prompts[0]]
    for place in (3, 7):
        token = wanted.token_ids[place]
        first = wanted.token_ids.index(token)
        found = vllm.answer(scene.prompts[0], None, scene.sampling.changed(stop_token_ids=(token,)))
        assert found.token_ids == wanted.token_ids[:first] and found.finish_reason == "stop"


def test_a_seed_repeats_a_draw_alone_and_in_company(scene, vllm):
    drawn = Sampling(max_new_tokens=12, temperature=1.3, top_p=0.9, top_k=50, seed=5)
    name = scene.adapters[0]
    alone = vllm.answer(scene.prompts[0], name, drawn).token_ids
    company = [(scene.prompts[0], name), *((prompt, None) for prompt in scene.prompts)]
    assert vllm.answers(company, drawn)[0].token_ids == alone
    assert vllm.answer(scene.prompts[0], name, drawn.changed(seed=6)).token_ids != alone


@pytest.mark.parametrize("adapter", [0, None])
def test_an_answer_has_the_form_that_was_asked_for(scene, vllm, adapter):
    name = None if adapter is None else scene.adapters[adapter]
    choice = Sampling(max_new_tokens=20, constraint=Constraint(choice=("plane", "string")))
    assert vllm.answer(scene.prompts[0], name, choice).text in ("plane", "string")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = Sampling(max_new_tokens=60, constraint=Constraint(json_schema=schema))
    found = vllm.answer(scene.prompts[1], name, form)
    assert found.finish_reason == "length" or json.loads(found.text)["a"] in (1, 2)
