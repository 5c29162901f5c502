"""Each answer of the engine is the one that its request gets alone, and the one of transformers with PEFT's adapter."""

import pytest
from tests.engine_scene import (
    ADAPTERS,
    STOP,
    greedy,
    in_threads,
    prompts_of,
    save_peft_adapter,
    wait_until,
    with_adapter,
    with_dense_updates,
)

from luthier.engine import Engine, Limits, Sampling

NAMES = [None, *ADAPTERS]
SCALING = {"narrow": 2.0, "wide": 2.0, "two": 1.0, "rslora": 3.0}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_each_row_of_a_mixed_batch_is_the_request_alone_and_peft_s(scenes, family):
    scene = scenes(family)
    asked = [
        (NAMES[place % len(NAMES)], prompt, 5 + 3 * (place % 4))
        for place, prompt in enumerate(prompts_of([1, 13, 40, 2, 7, 70, 29, 5, 64, 33, 3, 17, 50, 11, 8, 25]))
    ]
    with scene.engine(limits=Limits(kv_tokens=4096, prefill_tokens=24)) as engine:

        def ask(name, prompt, number):
            return engine.submit(prompt, adapter=name, sampling=Sampling(max_new_tokens=number, logprobs=0)).result(60)

        together = in_threads([lambda each=each: ask(*each) for each in asked])
        steps = engine.stats()["steps"]
    with scene.engine(prefix_bytes=0) as engine:
        alone = [ask(*each) for each in asked]
        assert engine.stats()["steps"] > steps, "the requests did not share steps"
    for (name, prompt, number), one, other in zip(asked, together, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert [each.logprob for each in one.logprobs] == pytest.approx([each.logprob for each in other.logprobs], abs=1e-4)
        scene.check(one, name, prompt, number)
    assert len({each.token_ids for each in alone}) > len(NAMES), "the adapters do nothing: nothing was compared"


def test_sampled_answers_with_a_seed_are_the_same_alone_and_in_company(scenes):
    scene = scenes()
    (prompt,) = prompts_of([9])
    settings = [
        Sampling(max_new_tokens=12, temperature=1.4, seed=seed, top_p=0.9 if seed % 2 else 1.0, top_k=30 * (seed % 3))
        for seed in range(14)
    ]
    names = [NAMES[place % len(NAMES)] for place in range(len(settings))]
    with scene.engine() as engine:
        together = engine.generate([prompt] * len(settings), names, settings)
        again = engine.generate([prompt] * len(settings), names, settings)
        alone = [engine.generate([prompt], name, how)[0] for name, how in zip(names, settings, strict=True)]
    assert [each.token_ids for each in together] == [each.token_ids for each in again] == [each.token_ids for each in alone]
    assert len({each.token_ids for each in together}) == len(settings)


def test_more_adapters_than_can_be_active_take_turns_and_stay_right(scenes):
    scene = scenes()
    names = ["narrow", "wide", "two", "rslora", "dora"]
    asked = [(names[(place * 3) % 5], prompt) for place, prompt in enumerate(prompts_of([6, 19, 3, 40, 12] * 3, seed=1))]
    limits = Limits(kv_tokens=2048, max_active_adapters=2, max_active_seconds=0.02)
    with scene.engine(limits=limits) as engine:
        answers = engine.generate(
            [prompt for _, prompt in asked], [name for name, _ in asked], Sampling(max_new_tokens=9, logprobs=0)
        )
        assert len(engine.stats()["scheduler"].active) == 2
    for answer, (name, prompt) in zip(answers, asked, strict=True):
        scene.check(answer, name, prompt, 9)


def test_answers_stay_right_while_adapters_are_evicted_and_read_again(scenes):
    scene = scenes()
    with scene.engine() as engine:
        engine.generate([[1]] * 2, ["wide", "dora"], Sampling(max_new_tokens=2))
        largest = max(each.bytes for each in engine.stats()["adapters"].adapters)
    names = ["wide", "dora", "narrow", "rslora", "ranks"]
    prompts = prompts_of([5, 45, 12], seed=2)
    with scene.engine(*names, adapter_bytes=2 * largest) as engine:
        for turn in range(8):
            mixed = [names[turn % 5], names[(turn + 2) % 5], None]
            for name, prompt, answer in zip(
                mixed, prompts, engine.generate(prompts, mixed, Sampling(max_new_tokens=8, logprobs=0)), strict=True
            ):
                scene.check(answer, name, prompt, 8)
        report = engine.stats()["adapters"]
    assert report.evictions > 0 and report.loads > len(names)
    assert report.resident_bytes <= report.limit_bytes


def test_a_prompt_seen_before_gives_the_same_answer_and_is_shared_by_nobody_else(scenes):
    scene = scenes()
    (prompt,) = prompts_of([75], seed=3)
    names = ["wide", None, "rslora", "dora"]
    with scene.engine() as engine:
        for cached in (0, 64):
            answers = engine.generate([prompt] * 4, names, Sampling(max_new_tokens=8, logprobs=0))
            assert [each.cached_tokens for each in answers] == [cached] * 4
            for name, answer in zip(names, answers, strict=True):
                scene.check(answer, name, prompt, 8)
        longer = prompt + list(answers[1].token_ids)[:3]
        (answer,) = engine.generate([longer], None, Sampling(max_new_tokens=6, logprobs=0))
        assert answer.cached_tokens == 64
        scene.check(answer, None, longer, 6)


def test_other_bytes_under_a_known_name_are_another_adapter(scenes):
    scene = scenes()
    (prompt,) = prompts_of([66], seed=4)
    with scene.engine("wide") as engine:
        for name in ("wide", "rslora", "dora", "wide"):
            engine.add_adapter("wide", scene.folders[name])
            for _ in range(2):
                (answer,) = engine.generate([prompt], "wide", Sampling(max_new_tokens=8, logprobs=0))
                scene.check(answer, name, prompt, 8)


def test_an_unloaded_adapter_finishes_what_it_has_and_gives_its_memory_back(scenes):
    scene = scenes()
    prompts = prompts_of([6, 9], seed=5)
    with scene.engine("wide", "dora") as engine:
        handles = [engine.submit(each, adapter="wide", sampling=Sampling(max_new_tokens=60)) for each in prompts]
        events = iter(handles[0])
        next(events)  # it runs
        done = engine.unload_adapter("wide")
        with pytest.raises(Exception, match="wide"):
            engine.submit(prompts[0], adapter="wide", sampling=Sampling(max_new_tokens=8))
        for handle, prompt in zip(handles, prompts, strict=True):
            scene.check(handle.result(60), "wide", prompt, 60)
        done.result(60)
        wait_until(lambda: engine.stats()["stacks_bytes"] == 0)
        assert [each.name for each in engine.stats()["adapters"].adapters] == ["dora"]
        assert engine.stats()["adapters"].resident_bytes == 0
        engine.add_adapter("wide", scene.folders["wide"])
        scene.check(engine.generate(prompts[:1], "wide", Sampling(max_new_tokens=8))[0], "wide", prompts[0], 8)


def test_an_adapter_that_is_unloaded_while_it_is_read_leaves_nothing_behind(scenes):
    scene = scenes()
    with scene.engine("wide") as engine:
        handle = engine.submit([1, 2, 3], adapter="wide", sampling=Sampling(max_new_tokens=8))
        done = engine.unload_adapter("wide")
        scene.check(handle.result(60), "wide", [1, 2, 3], 8)
        done.result(60)
        wait_until(lambda: engine.stats()["stacks_bytes"] == 0)


def test_several_adapters_with_strengths_are_the_sum_of_their_updates(scenes):
    scene = scenes()
    mixes = [
        {"narrow": 0.5, "rslora": 1.25},
        {"wide": -0.75, "two": 2.0, "narrow": 1.0},
        {"wide": 0.3},
        {"wide": 0.0},
    ]
    prompts = prompts_of([12, 5, 44, 8], seed=6)
    with scene.engine() as engine:
        answers = engine.generate(prompts, mixes, Sampling(max_new_tokens=10, logprobs=0))
    for mix, prompt, answer in zip(mixes, prompts, answers, strict=True):
        dense = with_dense_updates(
            scene.model, [(scene.folders[name], SCALING[name], strength) for name, strength in mix.items()]
        )
        tokens, logprobs = greedy(dense, prompt, 10, [STOP])
        assert answer.token_ids == tokens
        assert [each.logprob for each in answer.logprobs] == pytest.approx(logprobs, abs=1e-4)


def test_dora_is_served_alone_and_refused_in_a_mix(scenes):
    scene = scenes()
    with scene.engine() as engine:
        for mix in ({"dora": 1.0, "wide": 0.5}, {"dora": 0.5}):
            with pytest.raises(RuntimeError, match="'dora' is a DoRA adapter, so it is served alone and at strength 1 only"):
                engine.generate([[1, 2]], mix, Sampling(max_new_tokens=8))
        scene.check(engine.generate([[1, 2]], {"dora": 1.0}, Sampling(max_new_tokens=8))[0], "dora", [1, 2], 8)


# --- adapters that have to be merged -------------------------------------------------------------------------------

MERGED = {
    "whole": {"r": 4, "modules_to_save": ["lm_head"]},
    "biases": {"r": 4, "bias": "all"},
    "table": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "tokens": {"r": 4, "trainable_token_indices": [3, 7, 200]},
}


@pytest.fixture(scope="module")
def on_disk(build_tiny, byte_tokenizer, tmp_path_factory):
    """A base with biases in a folder, adapters that must be merged, and a plain one."""
    folder = tmp_path_factory.mktemp("base")
    model = build_tiny("llama", attention_bias=True)
    model.save_pretrained(folder / "base")
    byte_tokenizer.save_pretrained(folder / "base")
    made = {
        name: save_peft_adapter(model, folder / name, seed, **config)
        for seed, (name, config) in enumerate({**MERGED, "plain": {"r": 4}}.items())
    }
    return model, folder / "base", made


def test_adapters_that_have_to_be_merged_are_and_answer_beside_the_others(on_disk):
    model, base, folders = on_disk
    names = [None, *folders, *folders]
    prompts = [[3, 200, 7, *each] for each in prompts_of(range(2, 2 + len(names)), seed=7)]
    with Engine.load(str(base), dtype="float32", adapters=folders) as engine:
        answers = engine.generate(prompts, names, Sampling(max_new_tokens=9, logprobs=0))
    for name, prompt, answer in zip(names, prompts, answers, strict=True):
        tokens, logprobs = greedy(with_adapter(model, folders.get(name)), prompt, 9, [STOP])
        assert answer.token_ids == tokens, name
        assert [each.logprob for each in answer.logprobs] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("whole", r"it trains modules whole \(lm_head\)"),
        ("biases", "it trains biases"),
        ("table", "it adapts layers of kind embedding"),
        ("tokens", "it trains rows of tokens"),
    ],
)
def test_on_a_model_from_memory_they_are_refused_with_the_reason(on_disk, byte_tokenizer, name, reason):
    model, _, folders = on_disk
    with Engine(model, byte_tokenizer, adapters=folders) as engine:
        handle = engine.submit([1, 2], adapter=name, sampling=Sampling(max_new_tokens=8))
        with pytest.raises(RuntimeError, match=f"'{name}' has to be merged \\({reason}.*Engine.load"):
            handle.result(60)
        tokens, _ = greedy(with_adapter(model, folders["plain"]), [1, 2], 5, [STOP])
        assert engine.generate([[1, 2]], "plain", Sampling(max_new_tokens=5))[0].token_ids == tokens


def test_a_merged_adapter_is_served_alone(on_disk):
    _, base, folders = on_disk
    with Engine.load(str(base), dtype="float32", adapters=folders) as engine:
        for mix in ({"whole": 0.5}, {"whole": 1.0, "plain": 1.0}):
            with pytest.raises(RuntimeError, match=r"'whole' has to be merged .* alone and at strength 1 only"):
                engine.generate([[1, 2]], mix, Sampling(max_new_tokens=8))


# --- an architecture that the engine does not know -----------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(build_tiny, tmp_path_factory):
    model = build_tiny("gpt2")
    folder = tmp_path_factory.mktemp("gpt2")
    configs = {
        "plain": {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        "whole": {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["ln_f"]},
    }
    return model, {
        name: save_peft_adapter(model, folder / name, seed, **each) for seed, (name, each) in enumerate(configs.items())
    }


def test_a_model_of_an_unknown_layout_is_served_by_its_own_forward(gpt2, byte_tokenizer):
    model, folders = gpt2
    names = [None, "plain", "whole", "plain", None, "whole"]
    prompts = prompts_of([5, 20, 9, 41, 1, 13], seed=8)
    wanted = [
        greedy(with_adapter(model, folders.get(name)), prompt, 9, [STOP]) for name, prompt in zip(names, prompts, strict=True)
    ]
    with Engine(model, byte_tokenizer, adapters=folders, limits=Limits(kv_tokens=600, prefill_tokens=16)) as engine:
        assert "gpt2" in engine.stats()["slow_because"]
        asked = zip(names, prompts, strict=True)
        answers = in_threads(
            [
                lambda name=name, prompt=prompt: engine.submit(
                    prompt, adapter=name, sampling=Sampling(max_new_tokens=9, logprobs=0)
                ).result(60)
                for name, prompt in asked
            ]
        )
        scores = engine.score([(prompts[3], prompts[1]), ([1], [2, 3])], adapter="plain")
    for answer, (tokens, logprobs) in zip(answers, wanted, strict=True):
        assert answer.token_ids == tokens
        assert [each.logprob for each in answer.logprobs] == pytest.approx(logprobs, abs=1e-4)
    assert [len(each) for each in scores] == [20, 2]


def test_on_its_own_forward_what_replaces_modules_is_served_alone_and_hurts_nobody(gpt2, byte_tokenizer):
    model, folders = gpt2
    wanted, _ = greedy(with_adapter(model, folders["plain"]), [1, 2], 40, [STOP])
    half, _ = greedy(with_dense_updates(model, [(folders["plain"], 2.0, 0.5)], transposed=True), [1, 2], 8, [STOP])
    with Engine(model, byte_tokenizer, adapters=folders) as engine:
        for mix in ({"whole": 0.5}, {"whole": 1.0, "plain": 1.0}):
            other = engine.submit([1, 2], adapter="plain", sampling=Sampling(max_new_tokens=40))
            with pytest.raises(RuntimeError, match=r"'whole' replaces modules whole \(ln_f\), so it is served alone"):
                engine.generate([[1, 2]], mix, Sampling(max_new_tokens=8))
            assert other.result(60).token_ids == wanted
        assert engine.generate([[1, 2]], {"plain": 0.5}, Sampling(max_new_tokens=8))[0].token_ids == half


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_in_training_is_served_without_dropout_and_left_as_it_was(build_tiny, byte_tokenizer, tmp_path, family):
    model = build_tiny(family, **({"attention_dropout": 0.4} if family == "llama" else {}))
    wanted, _ = greedy(model, [1, 2, 3], 20, [STOP])
    targets = {"gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True}, "llama": {"target_modules": ["q_proj"]}}
    folder = save_peft_adapter(model, tmp_path / "a", 0, r=2, lora_dropout=0.5, **targets[family])
    worn, _ = greedy(with_adapter(model, folder), [1, 2, 3], 20, [STOP])
    model.train()
    model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    names, values = zip(*model.named_parameters(), strict=True)
    with Engine(model, byte_tokenizer, adapters={"a": folder}) as engine:
        assert (engine.stats()["slow_because"] is not None) == (family == "gpt2")
        answers = engine.generate([[1, 2, 3]] * 2, [None, "a"], Sampling(max_new_tokens=20))
        assert [each.token_ids for each in answers] == [wanted, worn]
    assert [module.training for module in model.modules()] == modes
    assert tuple(name for name, _ in model.named_parameters()) == names
    assert all(mine is other for mine, other in zip(model.parameters(), values, strict=True))
