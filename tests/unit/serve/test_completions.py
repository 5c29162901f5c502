"""Texts that go on, through OpenAI's own client against the engine."""

import openai
import pytest

from luthier.engine import Sampling

TEXT = "The luthier planed the spruce"


def said_by_engine(served, prompt=TEXT, **sampling):
    ids = served.gateway.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    return served.engine.generate([ids], None, Sampling(**sampling))[0]


def test_texts_and_token_ids_one_or_several(client, served):
    ids = served.gateway.tokenizer(TEXT)["input_ids"]
    other = served.gateway.tokenizer("Friday")["input_ids"]
    wanted, of_other = said_by_engine(served, max_new_tokens=6).text, said_by_engine(served, "Friday", max_new_tokens=6).text
    for prompt, texts in [
        (TEXT, [wanted]),
        ([TEXT, "Friday"], [wanted, of_other]),
        (ids, [wanted]),
        ([ids, other], [wanted, of_other]),
    ]:
        answer = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=6)
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == list(range(len(texts)))
        assert answer.usage.prompt_tokens == len(ids) + (len(other) if len(texts) > 1 else 0)


def test_sixteen_tokens_where_nothing_is_said(client):
    answer = client.completions.create(model="tiny", prompt=TEXT, temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16 and answer.choices[0].finish_reason == "length"


def test_n_answers_to_each_prompt_in_openais_order(client, served):
    answer = client.completions.create(model="tiny", prompt=[TEXT, "Friday"], n=2, best_of=2, temperature=1, seed=8, max_tokens=5)
    wanted = [
        said_by_engine(served, prompt, temperature=1, seed=seed, max_new_tokens=5).text
        for prompt in (TEXT, "Friday")
        for seed in (8, 9)
    ]
    assert [choice.text for choice in answer.choices] == wanted


def test_a_stream_is_the_same_in_pieces(client):
    asked = {"model": "alpha", "prompt": [TEXT, "Friday"], "temperature": 0, "max_tokens": 8, "logprobs": 2}
    whole = client.completions.create(**asked)
    texts, tokens, reasons = {0: "", 1: ""}, {0: [], 1: []}, {}
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        tokens[choice.index] += zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
        reasons[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert tokens[choice.index] == list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))
        assert reasons[choice.index] == choice.finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_logprobs_in_columns(client, served):
    answer = client.completions.create(model="tiny", prompt=TEXT, temperature=0, max_tokens=6, logprobs=2)
    found, wanted = answer.choices[0].logprobs, said_by_engine(served, max_new_tokens=6, logprobs=2)
    assert found.token_logprobs == pytest.approx([each.logprob for each in wanted.logprobs], abs=1e-5)
    assert found.text_offset == [sum(map(len, found.tokens[:place])) for place in range(6)]
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == max(top.values()) == pytest.approx(logprob)
    bare = client.completions.create(model="tiny", prompt=TEXT, temperature=0, max_tokens=6, logprobs=0)
    assert bare.choices[0].logprobs.tokens == found.tokens and bare.choices[0].logprobs.top_logprobs is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, None),
        ({"logprobs": 6}, "logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt.0"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [99_999]}, None),
        ({"prompt": ""}, None),
        ({"prompt": ["a"] * 65, "n": 2}, None),
        ({"extra_body": {"messages": []}}, "messages"),
    ],
)
def test_what_is_refused_is_named(client, body, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": TEXT, "max_tokens": 2} | body)
    assert caught.value.param == param
