"""Generation against a plain loop without cache, padding or batches."""

import logging
import threading

import pytest
import torch

from luthier.core.errors import ConfigError, DataError
from luthier.engine import Generation, generate, stream

STOP, PAD = 256, 257
TEXTS = ["To be", "The lute-maker's apprentice planes a top", "x", "seven words are in this one here", "Ein Stück Ahorn"]


@pytest.fixture
def prompts(byte_tokenizer):
    return [byte_tokenizer(text)["input_ids"] for text in TEXTS]


def plain_greedy(model, prompt, max_new_tokens, stops=(STOP,)):
    """The definition: the whole text through the model for each token, alone."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            return tuple(ids[len(prompt) :]), "stop"
        ids.append(token)
    return tuple(ids[len(prompt) :]), "length"


def test_greedy_batches_of_mixed_lengths_equal_one_by_one(tiny_model, byte_tokenizer, prompts):
    expected = [plain_greedy(tiny_model, prompt, 11) for prompt in prompts]
    for batch_rows in (1, 2, 32):
        answers = generate(tiny_model, byte_tokenizer, prompts, max_new_tokens=11, batch_rows=batch_rows)
        assert [(each.token_ids, each.finish_reason) for each in answers] == expected, f"batch_rows={batch_rows}"


def test_rows_stop_each_at_their_own_stop_token(tiny_decoder, byte_tokenizer, prompts):
    """Two tokens the model really produces become stop tokens, so that rows end at different places or run to the end."""
    free = [plain_greedy(tiny_decoder, prompt, 19)[0] for prompt in prompts]
    stops = (free[0][4], free[1][9])
    expected = [plain_greedy(tiny_decoder, prompt, 19, stops=(STOP, *stops)) for prompt in prompts]
    assert len({len(ids) for ids, _ in expected}) > 1, "the example must have rows of different lengths"
    assert {reason for _, reason in expected} == {"stop", "length"}
    tiny_decoder.generation_config.eos_token_id = list(stops)
    answers = generate(tiny_decoder, byte_tokenizer, prompts, max_new_tokens=19)
    assert [(each.token_ids, each.finish_reason) for each in answers] == expected


def test_one_stop_token_may_be_given_as_an_int(tiny_decoder, byte_tokenizer, prompts):
    stop = plain_greedy(tiny_decoder, prompts[0], 6)[0][5]
    tiny_decoder.generation_config.eos_token_id = stop
    (answer,) = generate(tiny_decoder, byte_tokenizer, prompts[:1], max_new_tokens=19)
    assert (answer.token_ids, answer.finish_reason) == plain_greedy(tiny_decoder, prompts[0], 19, stops=(STOP, stop))


def test_tokenizer_without_pad_token_gives_the_same_answers(tiny_decoder, byte_tokenizer, prompts):
    import copy

    bare = copy.deepcopy(byte_tokenizer)
    bare.pad_token = None
    assert generate(tiny_decoder, bare, prompts, max_new_tokens=11) == generate(
        tiny_decoder, byte_tokenizer, prompts, max_new_tokens=11
    )


def test_defaults_of_the_models_own_generation_config_do_not_leak_in(tiny_decoder, byte_tokenizer, prompts, caplog, recwarn):
    expected = generate(tiny_decoder, byte_tokenizer, prompts, max_new_tokens=19)
    config = tiny_decoder.generation_config
    config.do_sample, config.temperature, config.top_k, config.top_p = True, 0.6, 20, 0.9
    config.repetition_penalty, config.no_repeat_ngram_size, config.max_length = 1.9, 2, 64
    logging.getLogger("transformers").addHandler(caplog.handler)  # it does not pass its records on
    try:
        assert generate(tiny_decoder, byte_tokenizer, prompts, max_new_tokens=19) == expected
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == []
    assert list(recwarn) == []


def test_dropout_is_off_and_modes_come_back(tiny_decoder, byte_tokenizer, prompts):
    expected = generate(tiny_decoder, byte_tokenizer, prompts, max_new_tokens=7)
    tiny_decoder.config.attention_dropout = 0.9
    tiny_decoder.train()
    tiny_decoder.model.norm.eval()
    assert generate(tiny_decoder, byte_tokenizer, prompts, max_new_tokens=7) == expected
    assert tiny_decoder.training
    assert not tiny_decoder.model.norm.training


def test_sampling_is_repeatable_row_by_row_and_leaves_the_global_generator_alone(tiny_decoder, byte_tokenizer, prompts):
    state = torch.random.get_rng_state()
    settings = {"max_new_tokens": 11, "temperature": 0.8, "top_p": 0.9}
    together = generate(tiny_decoder, byte_tokenizer, prompts, seed=5, **settings)
    in_pairs = generate(tiny_decoder, byte_tokenizer, prompts, seed=5, batch_rows=2, **settings)
    other = generate(tiny_decoder, byte_tokenizer, prompts, seed=6, **settings)
    assert together == in_pairs
    assert together != other
    assert torch.equal(state, torch.random.get_rng_state())
    assert generate(tiny_decoder, byte_tokenizer, prompts, **settings) != generate(
        tiny_decoder, byte_tokenizer, prompts, **settings
    )


def test_a_stop_text_ends_its_row_and_is_not_in_the_text(tiny_decoder, byte_tokenizer, prompts):
    free = generate(tiny_decoder, byte_tokenizer, prompts, max_new_tokens=19)
    stops = [byte_tokenizer.decode(free[0].token_ids[5:7]), byte_tokenizer.decode(free[1].token_ids[11:12])]
    answers = generate(tiny_decoder, byte_tokenizer, prompts, max_new_tokens=19, stop_texts=stops)
    for row, (answer, whole) in enumerate(zip(answers, free, strict=True)):
        cuts = [whole.text.index(stop) for stop in stops if stop in whole.text]
        assert (row < 2) <= bool(cuts), "the example must have stops in its first rows"
        if cuts:
            assert (answer.text, answer.finish_reason) == (whole.text[: min(cuts)], "stop")
            assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
            assert any(stop in byte_tokenizer.decode(answer.token_ids) for stop in stops)
            assert not any(stop in byte_tokenizer.decode(answer.token_ids[:-1]) for stop in stops)
        else:
            assert answer == whole


def test_batches_are_bounded_by_what_rows_may_grow_to(tiny_decoder, byte_tokenizer, prompts):
    steps = []
    longest = max(map(len, prompts))
    options = {"max_new_tokens": 5, "on_progress": lambda done, total: steps.append(done)}
    bounded = generate(tiny_decoder, byte_tokenizer, prompts, batch_tokens=2 * (longest + 5), **options)
    assert steps[0] == 2 and steps[-1] == 5
    assert bounded == generate(tiny_decoder, byte_tokenizer, prompts, max_new_tokens=5)


def test_progress_counts_to_the_end(tiny_decoder, byte_tokenizer, prompts):
    steps = []
    generate(tiny_decoder, byte_tokenizer, prompts, max_new_tokens=1, batch_rows=2, on_progress=lambda *step: steps.append(step))
    assert steps == [(2, 5), (4, 5), (5, 5)]


def test_no_prompts_give_no_answers(tiny_decoder, byte_tokenizer):
    assert generate(tiny_decoder, byte_tokenizer, []) == []


def test_impossible_settings_are_all_named(tiny_decoder, byte_tokenizer, prompts):
    with pytest.raises(ConfigError) as caught:
        generate(tiny_decoder, byte_tokenizer, prompts, max_new_tokens=0, batch_rows=0, temperature=-1.0, top_p=1.5)
    for word in ("max_new_tokens is 0", "batch_rows is 0", "temperature is -1.0", "top_p is 1.5"):
        assert word in str(caught.value)
    with pytest.raises(ConfigError, match="top_p and seed would have no effect at temperature 0"):
        generate(tiny_decoder, byte_tokenizer, prompts, top_p=0.5, seed=1)


def test_prompts_the_model_cannot_read_are_all_named(tiny_decoder, byte_tokenizer):
    bad = [[], [1, 2, 263], [5] * 90, [1, 2]]
    with pytest.raises(DataError) as caught:
        generate(tiny_decoder, byte_tokenizer, bad, max_new_tokens=7)
    assert "3 of 4 prompts" in str(caught.value)
    for word in ("prompt 0 is empty", "prompt 1 holds token 263", "prompt 2 has 90 tokens"):
        assert word in str(caught.value)
    with pytest.raises(DataError, match="prompt 0 is empty"):
        stream(tiny_decoder, byte_tokenizer, [])


def test_stream_joined_is_the_text_of_generate(tiny_model, byte_tokenizer, prompts):
    """Random bytes as answers: half characters, broken ones, control characters."""
    for prompt in prompts:
        (whole,) = generate(tiny_model, byte_tokenizer, [prompt], max_new_tokens=23)
        assert "".join(stream(tiny_model, byte_tokenizer, prompt, max_new_tokens=23)) == whole.text


def test_stream_samples_what_generate_samples(tiny_decoder, byte_tokenizer, prompts):
    settings = {"max_new_tokens": 13, "temperature": 1.1, "top_p": 0.95, "seed": 4}
    (whole,) = generate(tiny_decoder, byte_tokenizer, prompts[:1], **settings)
    assert "".join(stream(tiny_decoder, byte_tokenizer, prompts[0], **settings)) == whole.text


def test_stream_holds_back_half_a_character(tiny_decoder, byte_tokenizer, prompts):
    """A model that writes one euro sign (three bytes) after the other: every piece is whole signs."""
    euro = byte_tokenizer("€")["input_ids"]
    follow(tiny_decoder, {euro[0]: euro[1], euro[1]: euro[2], euro[2]: euro[0]}, otherwise=euro[0])
    assert list(stream(tiny_decoder, byte_tokenizer, prompts[0], max_new_tokens=9)) == ["€", "€", "€"]


def test_stream_ends_without_the_stop_token(tiny_decoder, byte_tokenizer, prompts):
    a, b = byte_tokenizer("ab")["input_ids"]
    follow(tiny_decoder, {a: b, b: STOP}, otherwise=a)
    assert list(stream(tiny_decoder, byte_tokenizer, prompts[2], max_new_tokens=9)) == ["a", "b"]
    assert generate(tiny_decoder, byte_tokenizer, [prompts[2]], max_new_tokens=9) == [Generation("ab", (a, b), "stop")]


def test_stream_raises_what_went_wrong_in_its_thread(tiny_decoder, byte_tokenizer, prompts):
    def fail(module, args):
        raise RuntimeError("the string broke")

    pieces = stream(tiny_decoder, byte_tokenizer, prompts[0], max_new_tokens=9)
    handle = tiny_decoder.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the string broke"):
        list(pieces)
    handle.remove()
    assert not running_streams()
    assert "".join(stream(tiny_decoder, byte_tokenizer, prompts[0], max_new_tokens=3))


def test_closing_a_stream_early_stops_the_model(tiny_decoder, byte_tokenizer, prompts):
    steps = []
    tiny_decoder.lm_head.register_forward_pre_hook(lambda module, args: steps.append(1))
    follow(tiny_decoder, {}, otherwise=byte_tokenizer("a")["input_ids"][0])
    tiny_decoder.train()
    pieces = stream(tiny_decoder, byte_tokenizer, prompts[2], max_new_tokens=90)
    assert next(pieces) == "a"
    pieces.close()
    taken = len(steps)
    assert not running_streams()
    assert 1 <= taken < 90
    assert tiny_decoder.training


def follow(model, table, otherwise):
    """Make the model say the token that the table has after the last one."""

    def rewrite(module, args, kwargs, output):
        last = kwargs["input_ids"][:, -1].tolist()
        output.logits[:] = -10.0
        for row, token in enumerate(last):
            output.logits[row, -1, table.get(token, otherwise)] = 10.0
        return output

    model.register_forward_hook(rewrite, with_kwargs=True)


def running_streams():
    return [thread for thread in threading.enumerate() if thread.name == "luthier-stream"]
