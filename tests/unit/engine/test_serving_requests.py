"""Requests of one engine: streams, cancelling, what is refused and what fails, scores, and how answers are drawn and ended."""

import asyncio
import itertools
import shutil
import threading

import pytest
import torch
from tests.engine_scene import STOP, greedy, prompts_of, wait_until, with_adapter
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from luthier.adapt import attach
from luthier.core.config import LoraConfig
from luthier.core.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterStateError,
    BaseMismatchError,
    ConfigError,
    DataError,
    EngineError,
    QueueFullError,
    RequestError,
)
from luthier.engine import Engine, Limits, Sampling, log_likelihoods
from luthier.formats.adapters import load_adapter, save_adapter

PROMPT = prompts_of([11], seed=20)[0]
LONG = Sampling(max_new_tokens=80, ignore_eos=True)


class Hold:
    """An `on_event` that keeps the engine's thread at the first event until it is let go."""

    def __init__(self):
        self.came, self.let_go = threading.Event(), threading.Event()

    def __call__(self, event):
        self.came.set()
        assert self.let_go.wait(20)


def running(engine):
    seen = engine.stats()["scheduler"]
    return seen.prefilling + seen.decoding


# --- streams and cancelling ----------------------------------------------------------------------------------------


def test_streams_give_what_generate_gives(scenes):
    how = Sampling(max_new_tokens=30, logprobs=2)
    with scenes().engine() as engine:
        (whole,) = engine.generate([PROMPT], "wide", how)
        (other,) = engine.generate([PROMPT], None, how)

        async def of_events():
            return [event async for event in engine.astream(PROMPT, adapter="wide", sampling=how)]

        async def both():
            return await asyncio.gather(
                engine.agenerate(PROMPT, adapter="wide", sampling=how), engine.agenerate(PROMPT, sampling=how)
            )

        for events in (list(engine.stream(PROMPT, adapter="wide", sampling=how)), asyncio.run(of_events())):
            assert len(events) == 30
            assert "".join(event.text for event in events) == whole.text
            assert tuple(itertools.chain(*(event.token_ids for event in events))) == whole.token_ids
            assert len(list(itertools.chain(*(event.logprobs for event in events)))) == 30
            assert [event.completion is None for event in events] == [True] * 29 + [False]
            assert events[-1].completion.token_ids == whole.token_ids
        assert [each.text for each in asyncio.run(both())] == [whole.text, other.text]
    assert whole.text != other.text


@pytest.mark.parametrize("way", ["leave a stream", "cancel a handle", "cancel a task", "close an astream"])
def test_who_leaves_early_frees_the_row(scenes, way):
    with scenes().engine() as engine:

        async def cancel_task():
            task = asyncio.create_task(engine.agenerate(PROMPT, adapter="wide", sampling=LONG))
            while not running(engine):
                await asyncio.sleep(0.002)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        async def close_stream():
            events = engine.astream(PROMPT, adapter="wide", sampling=LONG)
            await anext(events)
            await events.aclose()

        if way == "leave a stream":
            for event in engine.stream(PROMPT, adapter="wide", sampling=LONG):
                assert event.completion is None
                break
        elif way == "cancel a handle":
            handle = engine.submit(PROMPT, adapter="wide", sampling=LONG)
            wait_until(lambda: running(engine))
            handle.cancel()
            answer = handle.result(60)
            assert answer.finish_reason == "cancelled"
            assert (
                answer.token_ids
                == greedy(with_adapter(scenes().model, scenes().folders["wide"]), PROMPT, 80)[0][: len(answer.token_ids)]
            )
        else:
            asyncio.run(cancel_task() if way == "cancel a task" else close_stream())
        wait_until(lambda: not running(engine))
        wait_until(lambda: engine.stats()["kv_bytes"] == 0)
        assert engine.stats()["ended_cancelled"] == 1
        assert engine.stats()["adapters"].bytes_in_use == 0
        assert engine.generate([PROMPT], "wide", Sampling(max_new_tokens=3))[0].finish_reason == "length"


def test_a_request_can_be_cancelled_before_its_adapter_is_there(scenes):
    with scenes().engine() as engine:
        handles = [engine.submit(PROMPT, adapter=name, sampling=LONG) for name in ("wide", "dora", "wide")]
        for handle in handles[:2]:
            handle.cancel()
        assert [handle.result(60).finish_reason for handle in handles] == ["cancelled", "cancelled", "length"]
        wait_until(lambda: engine.stats()["adapters"].bytes_in_use == 0)


def test_a_callback_that_fails_ends_its_request_only(scenes, caplog):
    def fail(event):
        raise KeyError("a bug of the caller")

    with scenes().engine() as engine:
        other = engine.submit(PROMPT, sampling=LONG)
        bad = engine.submit(PROMPT, sampling=LONG, on_event=fail)
        assert bad.result(60).finish_reason == "cancelled"
        assert other.result(60).token_ids == greedy(scenes().model, PROMPT, 80)[0]
    assert "a bug of the caller" in caplog.text


# --- what is refused and what fails --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad_folders(scenes, build_tiny, tmp_path_factory):
    """Adapter folders that cannot be served on the scene's base, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("bad")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian")
    for name, other in (("other base", build_tiny("llama")), ("other size", build_tiny("llama", hidden_size=40))):
        with torch.no_grad():
            next(other.parameters()).mul_(1.5)
        attach(other, config)
        save_adapter(other, folder / name)
    shutil.copytree(scenes().folders["wide"], folder / "cut short")
    file = folder / "cut short" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    # As one that does not name its base, so that only the shapes tell.
    (folder / "other size" / "luthier.json").unlink()
    return {name: folder / name for name in ("other base", "other size", "cut short", "not there")}


def test_bad_requests_fail_one_by_one_and_those_in_flight_go_on(scenes, bad_folders):
    scene, hold = scenes(), Hold()
    with scene.engine("wide", "narrow", limits=Limits(kv_tokens=1000, max_active_adapters=2)) as engine:
        for name, folder in bad_folders.items():
            engine.add_adapter(name, folder)
        good = [engine.submit(PROMPT, adapter="wide", sampling=LONG, on_event=hold)]
        assert hold.came.wait(60)
        good += [engine.submit(PROMPT, adapter=name, sampling=LONG) for name in (None, "narrow")]
        at_once = [
            ({"adapter": "wid"}, AdapterStateError, "there is no adapter 'wid' here.*'wide'"),
            ({"prompt_ids": []}, DataError, "the prompt is empty"),
            ({"prompt_ids": [5, 263]}, DataError, "token 263 is not the model's, which knows 0 to 262"),
            ({"prompt_ids": [-1]}, DataError, "token -1 is not the model's"),
            ({"prompt_ids": [1] * 95}, RequestError, "95 tokens of prompt and up to 8 of answer are 103; there is room for 96"),
            ({"adapter": {"wide": float("nan")}}, DataError, "the strength of adapter 'wide' is nan"),
        ]
        for asked, error, message in at_once:
            with pytest.raises(error, match=message):
                engine.submit(**{"prompt_ids": [1], "sampling": Sampling(max_new_tokens=8)} | asked)
        later = [
            ("other base", BaseMismatchError, "was trained on another base: the norms agree but"),
            ("other size", AdapterMismatchError, r"q_proj.lora_A.weight is \(2, 40\), needs \(2, 48\)"),
            ("cut short", AdapterFormatError, "adapter_model.safetensors is truncated"),
            ("not there", AdapterFormatError, "not there is not an adapter folder"),
            ({"wide": 1.0, "narrow": 1.0, "dora": 1.0}, RequestError, "3 adapters, of which 2 can be active"),
        ]
        engine.add_adapter("dora", scene.folders["two"])
        handles = [engine.submit([1], adapter=name, sampling=Sampling(max_new_tokens=8)) for name, _, _ in later]
        hold.let_go.set()
        for handle, (name, error, message) in zip(handles, later, strict=True):
            with pytest.raises(error, match=message):
                handle.result(60)
            with pytest.raises(error):
                list(engine.stream([1], adapter=name, sampling=Sampling(max_new_tokens=8)))
            with pytest.raises(error):
                asyncio.run(engine.agenerate([1], adapter=name, sampling=Sampling(max_new_tokens=8)))
        for handle, name in zip(good, ("wide", None, "narrow"), strict=True):
            worn = with_adapter(scene.model, scene.folders.get(name))
            assert handle.result(60).token_ids == greedy(worn, PROMPT, 80)[0]
        assert engine.stats()["adapters"].bytes_in_use == 0


def test_a_full_queue_is_told_at_once_and_generate_waits_for_room(scenes):
    hold = Hold()
    with scenes().engine(limits=Limits(kv_tokens=400, max_queue=2)) as engine:
        first = engine.submit(PROMPT, sampling=LONG, on_event=hold)
        assert hold.came.wait(60)
        waiting = [engine.submit(PROMPT, sampling=Sampling(max_new_tokens=4)) for _ in range(2)]
        with pytest.raises(QueueFullError, match="the queue is full: 2 requests wait, 2 may"):
            engine.submit(PROMPT, sampling=LONG)
        hold.let_go.set()
        wanted = greedy(scenes().model, PROMPT, 80)[0]
        assert first.result(60).token_ids == wanted
        assert [handle.result(60).token_ids for handle in waiting] == [wanted[:4]] * 2
        seen = []
        answers = engine.generate([PROMPT] * 9, None, Sampling(max_new_tokens=4), on_progress=lambda *each: seen.append(each))
        assert [each.token_ids for each in answers] == [wanted[:4]] * 9
        assert seen == [(done, 9) for done in range(1, 10)]


def test_the_full_queue_of_a_tenant_is_told_at_once_and_is_not_the_others(scenes):
    hold = Hold()
    with scenes().engine(limits=Limits(kv_tokens=400, max_queue_per_tenant=1)) as engine:
        first = engine.submit(PROMPT, sampling=LONG, on_event=hold, tenant="a")
        assert hold.came.wait(60)
        short = Sampling(max_new_tokens=4)
        waiting = [engine.submit(PROMPT, sampling=short, tenant=tenant) for tenant in ("a", "b")]
        with pytest.raises(QueueFullError, match="the queue of tenant 'a' is full: 1 requests wait, 1 may"):
            engine.submit(PROMPT, sampling=short, tenant="a")
        hold.let_go.set()
        assert {handle.result(60).finish_reason for handle in (first, *waiting)} == {"length"}
        assert len(engine.generate([PROMPT] * 5, None, short, tenant="a")) == 5


def test_a_closed_engine_ends_what_it_has_and_takes_nothing(scenes):
    hold = Hold()
    engine = scenes().engine()
    handles = [engine.submit(PROMPT, sampling=LONG, on_event=hold), *(engine.submit(PROMPT, sampling=LONG) for _ in range(3))]
    assert hold.came.wait(60)
    closing = threading.Thread(target=engine.close)
    closing.start()
    hold.let_go.set()
    closing.join(60)
    assert [handle.result(60).finish_reason for handle in handles] == ["cancelled"] * 4
    with pytest.raises(EngineError, match="closed"):
        engine.submit(PROMPT, sampling=LONG)
    engine.close()


def test_an_adapter_that_finds_no_memory_fails_its_request_and_may_come_again(scenes, monkeypatch):
    scene, hold = scenes(), Hold()
    with scene.engine("wide", "narrow") as engine:
        runner = engine._host.runner
        activate, short = runner.activate, [True]

        def without_memory(key, rank, pairs):
            if rank == 8 and short.pop():
                raise MemoryError("no room for it")
            activate(key, rank, pairs)

        monkeypatch.setattr(runner, "activate", without_memory)
        other = engine.submit(PROMPT, adapter="narrow", sampling=LONG, on_event=hold)
        assert hold.came.wait(60)
        bad = engine.submit(PROMPT, adapter="wide", sampling=LONG)
        hold.let_go.set()
        with pytest.raises(MemoryError):
            bad.result(60)
        scene.check(other.result(60), "narrow", PROMPT, 80)
        short.append(False)
        scene.check(engine.generate([PROMPT], "wide", LONG)[0], "wide", PROMPT, 80)


@pytest.mark.parametrize(("where", "lives_on"), [("step", True), ("remember", False)])
def test_nobody_waits_forever_for_an_engine_that_failed(scenes, monkeypatch, where, lives_on):
    """A step that fails takes its requests with it; a fault that nothing was prepared for takes the engine, and says so."""
    with scenes().engine() as engine:
        runner = engine._host.runner
        method, failing = getattr(runner, where), [True]

        def failing_once(*arguments):
            if failing and failing.pop():
                raise RuntimeError("out of luck")
            return method(*arguments)

        monkeypatch.setattr(runner, where, failing_once)
        handle = engine.submit(PROMPT, sampling=LONG)
        with pytest.raises(RuntimeError, match="out of luck"):
            handle.result(60)
        if lives_on:
            assert engine.generate([PROMPT], None, LONG)[0].token_ids == greedy(scenes().model, PROMPT, 80)[0]
            assert engine.stats()["kv_bytes"] == 0
        else:
            with pytest.raises(EngineError, match=r"fault of its own \(out of luck\); make a new one"):
                engine.submit(PROMPT, sampling=LONG)


def test_as_many_adapters_and_samplings_as_prompts_or_one(scenes):
    with scenes().engine() as engine, pytest.raises(ConfigError, match="2 prompts, 1 adapters and 2 samplings"):
        engine.generate([PROMPT] * 2, ["wide"])


# --- scores --------------------------------------------------------------------------------------------------------

ROWS = [tuple(prompts_of(lengths, seed=21)) for lengths in [(1, 1), (7, 12), (40, 1), (3, 60), (50, 20), (50, 3)]]


def plain_scores(model, rows):
    with torch.no_grad():
        for context, rest in rows:
            logprobs = model(input_ids=torch.tensor([[*context, *rest]]), use_cache=False).logits[0].double().log_softmax(-1)
            yield [float(logprobs[len(context) - 1 + place, token]) for place, token in enumerate(rest)]


@pytest.mark.parametrize("name", [None, "wide", "dora"])
@pytest.mark.parametrize("limits", [None, Limits(kv_tokens=200, prefill_tokens=9)])
def test_scores_are_log_softmax_and_sum_to_log_likelihoods(scenes, build_tiny, name, limits):
    scene = scenes()
    with scene.engine(limits=limits) as engine:
        busy = engine.submit(PROMPT, adapter="narrow", sampling=LONG)
        for _ in range(2):  # the second time from the prefix cache
            scores = engine.score(ROWS, adapter=name)
            for found, wanted in zip(scores, plain_scores(with_adapter(scene.model, scene.folders.get(name)), ROWS), strict=True):
                assert found == pytest.approx(wanted, abs=1e-4)
        scene.check(busy.result(60), "narrow", PROMPT, 80)
        for row, fault in ((([], [1]), "needs a context"), (([1], []), "needs a context"), (([1], [263]), "token 263")):
            with pytest.raises(DataError, match=fault):
                engine.score([row], adapter=name)
    model = build_tiny("llama")
    if name is not None:
        load_adapter(model, scene.folders[name])
    assert [sum(each) for each in scores] == pytest.approx(log_likelihoods(model, ROWS), abs=1e-3)


def test_scores_of_a_model_of_an_unknown_layout_are_the_same_in_pieces(build_tiny, byte_tokenizer):
    model = build_tiny("gpt2")
    with Engine(model, byte_tokenizer, limits=Limits(kv_tokens=200, prefill_tokens=9)) as engine:
        scores = engine.score(ROWS)
    for found, wanted in zip(scores, plain_scores(model, ROWS), strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)


# --- how answers are drawn and ended -------------------------------------------------------------------------------


def test_a_stop_text_ends_the_answer_which_comes_without_it(scenes):
    tokenizer = scenes().tokenizer
    tokens, _ = greedy(scenes().model, PROMPT, 40)
    whole = tokenizer.decode(list(tokens), skip_special_tokens=True)
    stops = [whole[place : place + 3] for place in (4, 9, 17)]
    with scenes().engine() as engine:
        for stop in ((stops[0],), (stops[2], stops[1]), ("never said",)):
            answer = engine.generate([PROMPT], None, Sampling(max_new_tokens=40, ignore_eos=True, stop=stop))[0]
            ends = [whole.find(each) for each in stop if each in whole]
            assert answer.text == whole[: min(ends, default=len(whole))]
            assert answer.finish_reason == ("stop" if ends else "length")
            events = list(engine.stream(PROMPT, sampling=Sampling(max_new_tokens=40, ignore_eos=True, stop=stop)))
            assert "".join(event.text for event in events) == answer.text


def test_stop_tokens_end_the_answer_and_are_not_in_it(scenes, byte_tokenizer):
    model = scenes().model
    free, _ = greedy(model, PROMPT, 20)
    stop = free[7]
    wanted, _ = greedy(model, PROMPT, 20, [stop])
    with scenes().engine() as engine:
        (answer,) = engine.generate([PROMPT], None, Sampling(max_new_tokens=20, stop_token_ids=(stop,)))
        (ignoring,) = engine.generate([PROMPT], None, Sampling(max_new_tokens=20, stop_token_ids=(stop,), ignore_eos=True))
    assert answer.token_ids == ignoring.token_ids == wanted and len(wanted) < 20
    assert answer.finish_reason == "stop" and answer.prompt_tokens == len(PROMPT)
    model.generation_config.eos_token_id = [stop, STOP]
    try:
        with Engine(model, byte_tokenizer) as engine:
            own, ignoring = engine.generate([PROMPT] * 2, None, [Sampling(max_new_tokens=20), LONG])
    finally:
        model.generation_config.eos_token_id = None
    assert own.token_ids == wanted and own.finish_reason == "stop"
    assert ignoring.token_ids[:20] == free and len(ignoring.token_ids) == 80


@torch.no_grad()
def logits_behind(model, tokens):
    ids = torch.tensor([[*PROMPT, *tokens]])
    return model(input_ids=ids, use_cache=False).logits[0, len(PROMPT) - 1 : -1]


def test_log_probabilities_and_alternatives_are_those_of_the_plain_logits(scenes):
    settings = [
        Sampling(max_new_tokens=12, logprobs=5),
        Sampling(max_new_tokens=12, logprobs=1, temperature=2.0, seed=3),
        Sampling(max_new_tokens=12, logprobs=3, repetition_penalty=1.5),
    ]
    with scenes().engine() as engine:
        answers = engine.generate([PROMPT] * 3, "rslora", settings)
    worn = with_adapter(scenes().model, scenes().folders["rslora"])
    for answer, how in zip(answers, settings, strict=True):
        expected = logits_behind(worn, answer.token_ids).double().log_softmax(-1)
        assert [each.token for each in answer.logprobs] == list(answer.token_ids)
        for place, each in enumerate(answer.logprobs):
            values, ids = expected[place].topk(how.logprobs)
            assert each.logprob == pytest.approx(float(expected[place, each.token]), abs=1e-4)
            assert [token for token, _ in each.alternatives] == ids.tolist()
            assert [value for _, value in each.alternatives] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_a_repetition_penalty_gives_transformers_answer(scenes, penalty):
    scene = scenes()
    with scene.engine() as engine:
        (answer,) = engine.generate(
            [PROMPT], "wide", Sampling(max_new_tokens=40, repetition_penalty=penalty, logprobs=0, ignore_eos=True)
        )
    tokens, logprobs = greedy(with_adapter(scene.model, scene.folders["wide"]), PROMPT, 40, repetition_penalty=penalty)
    assert answer.token_ids == tokens != scene.wanted("wide", PROMPT, 40)[0]
    assert [each.logprob for each in answer.logprobs] == pytest.approx(logprobs, abs=1e-4)


def test_presence_and_frequency_penalties_count_what_the_answer_has(scenes):
    """As OpenAI's API reference writes them: logit - presence * (count > 0) - frequency * count."""
    presence, frequency = 1.5, 0.8
    with scenes().engine() as engine:
        (answer,) = engine.generate(
            [PROMPT],
            None,
            Sampling(max_new_tokens=30, presence_penalty=presence, frequency_penalty=frequency, ignore_eos=True),
        )
    logits = logits_behind(scenes().model, answer.token_ids)
    for place, token in enumerate(answer.token_ids):
        counts = torch.bincount(torch.tensor(answer.token_ids[:place], dtype=torch.long), minlength=logits.shape[-1])
        assert token == int((logits[place] - presence * (counts > 0) - frequency * counts).argmax())
    assert answer.token_ids != greedy(scenes().model, PROMPT, 30)[0]


def test_sampled_tokens_are_those_that_transformers_warpers_leave(scenes):
    warpers = LogitsProcessorList(
        [TemperatureLogitsWarper(1.5), TopKLogitsWarper(7), TopPLogitsWarper(0.8), MinPLogitsWarper(0.1)]
    )
    how = {"max_new_tokens": 20, "temperature": 1.5, "top_k": 7, "top_p": 0.8, "min_p": 0.1, "ignore_eos": True}
    with scenes().engine() as engine:
        answers = engine.generate([PROMPT] * 12, None, [Sampling(seed=seed, **how) for seed in range(12)])
    for answer in answers:
        left = warpers(None, logits_behind(scenes().model, answer.token_ids)).isfinite()
        assert left[torch.arange(20), torch.tensor(answer.token_ids)].all()
    assert len({answer.token_ids for answer in answers}) > 6, "nothing was sampled"
