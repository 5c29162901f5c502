"""vLLM's words for a request and its answer. The stream is written here as vLLM 0.32 writes it; tests/vllm asks the real one."""

import asyncio
import json

import pytest

from luthier.core.errors import EngineError
from luthier.engine.requests import Constraint, Sampling
from luthier.serve.vllm.asking import Answer, body_of, structured

PROMPT = (3, 4, 5)
STOP = 2


def chunk(ids=(), finish=None, logprobs=None, **more) -> str:
    choice = {"index": 0, "text": "", "token_ids": list(ids), "finish_reason": finish, "logprobs": logprobs}
    return "data: " + json.dumps({"id": "cmpl-1", "choices": [choice]} | more)


def usage(cached: int) -> str:
    told = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": cached}}
    return "data: " + json.dumps({"choices": [], "usage": told})


class Stream:
    """The lines of an answer, and how many of them were read."""

    def __init__(self, *lines: str):
        self.lines, self.read = lines, 0

    async def __aiter__(self):
        for line in self.lines:
            self.read += 1
            yield line
            yield ""


def events(tokenizer, stream: Stream, **sampling):
    answer = Answer(tokenizer, PROMPT, Sampling(**sampling), {STOP, *sampling.get("stop_token_ids", ())})

    async def go():
        return [event async for event in answer.events(aiter(stream))]

    return asyncio.run(go())


def test_tokens_become_the_text_that_the_tokenizer_makes_of_them(tiny_tokenizer):
    ids = tiny_tokenizer("wie lange dauert es? drei wochen")["input_ids"]
    stream = Stream(*(chunk([token]) for token in ids), chunk([STOP], "stop"), usage(1), "data: [DONE]")
    found = events(tiny_tokenizer, stream, max_new_tokens=99)
    done = found[-1].completion
    assert "".join(event.text for event in found) == done.text == "wie lange dauert es? drei wochen"
    assert done.token_ids == tuple(ids) == tuple(token for event in found for token in event.token_ids)
    assert (done.finish_reason, done.prompt_tokens, done.cached_tokens, done.logprobs) == ("stop", 3, 1, None)
    assert all(event.completion is None for event in found[:-1])


def test_several_tokens_may_come_at_once(tiny_tokenizer):
    ids = tiny_tokenizer("one two three")["input_ids"]
    (only,) = events(tiny_tokenizer, Stream(chunk(ids, "length"), usage(0)), max_new_tokens=len(ids))
    assert only.completion.text == "one two three" and only.completion.finish_reason == "length"


def test_an_answer_ends_before_its_stop_text_and_reads_no_further(tiny_tokenizer):
    ids = tiny_tokenizer("first line\nsecond line")["input_ids"]
    stream = Stream(*(chunk([token]) for token in ids), chunk([STOP], "stop"), usage(0))
    found = events(tiny_tokenizer, stream, stop=("\n",), max_new_tokens=99)
    assert found[-1].completion.text == "first line" == "".join(event.text for event in found)
    assert found[-1].completion.finish_reason == "stop"
    assert stream.read < len(ids)


def test_tokens_after_the_last_one_that_was_asked_for_do_not_count(tiny_tokenizer):
    ids = tiny_tokenizer("one two three four")["input_ids"]
    found = events(tiny_tokenizer, Stream(chunk(ids), usage(0)), max_new_tokens=2)
    assert found[-1].completion.token_ids == tuple(ids[:2]) and found[-1].completion.finish_reason == "length"


def test_a_stop_token_of_the_request_ends_it(tiny_tokenizer):
    ids = tiny_tokenizer("one two three four")["input_ids"]
    found = events(tiny_tokenizer, Stream(chunk(ids), usage(0)), max_new_tokens=99, stop_token_ids=(ids[3],))
    assert found[-1].completion.token_ids == tuple(ids[:3]) and found[-1].completion.finish_reason == "stop"


def test_logprobs_are_those_of_the_tokens_likeliest_first(tiny_tokenizer):
    told = {
        "tokens": ["token_id:9", "token_id:8"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"token_id:9": -0.5, "token_id:4": -1.5}, {"token_id:8": -2.0, "token_id:7": -0.1, "token_id:6": -0.9}],
    }
    found = events(tiny_tokenizer, Stream(chunk([9, 8], "length", told), usage(0)), max_new_tokens=2, logprobs=2)
    first, second = found[-1].completion.logprobs
    assert (first.token, first.logprob, first.alternatives) == (9, -0.5, ((9, -0.5), (4, -1.5)))
    assert (second.token, second.alternatives) == (8, ((7, -0.1), (6, -0.9)))


def test_a_stream_that_breaks_off_is_an_error(tiny_tokenizer):
    with pytest.raises(EngineError, match="broke off"):
        events(tiny_tokenizer, Stream(chunk([9])), max_new_tokens=5)


@pytest.mark.parametrize(
    "line",
    [
        'data: {"error": {"message": "EngineDeadError", "type": "InternalServerError", "code": 500}}',
        chunk([9], "abort"),
        chunk([], "error"),
    ],
)
def test_what_vllm_could_not_finish_is_an_error(tiny_tokenizer, line):
    with pytest.raises(EngineError, match="vLLM"):
        events(tiny_tokenizer, Stream(chunk([9]), line), max_new_tokens=5)


def test_a_request_says_all_of_how_to_draw(tiny_tokenizer):
    sampling = Sampling(
        max_new_tokens=7,
        temperature=0.8,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        seed=11,
        logprobs=2,
        logit_bias={7: 1.5},
    )
    body = body_of("orders:1", PROMPT, sampling, {5, 2}, "salt")
    expected = sampling.model_dump(exclude={"max_new_tokens", "stop", "stop_token_ids", "ignore_eos", "constraint", "logit_bias"})
    assert {name: body[name] for name in expected} == expected
    assert (body["prompt"], body["max_tokens"], body["stop_token_ids"], body["cache_salt"]) == ([3, 4, 5], 7, [2, 5], "salt")
    assert body["logit_bias"] == {"7": 1.5}
    assert body["ignore_eos"] and body["stream"] and body["return_token_ids"] and "stop" not in body


@pytest.mark.parametrize(
    ("constraint", "told"),
    [
        ({"json_schema": {"type": "object"}}, {"json": {"type": "object"}}),
        ({"json_object": True}, {"json_object": True}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"choice": ("yes", "no")}, {"choice": ["yes", "no"]}),
        ({"grammar": "start: /a/"}, {"grammar": "start: /a/"}),
    ],
)
def test_forms_by_vllms_names(constraint, told):
    assert structured(Constraint(**constraint)) == told
