"""A judgement of a real adapter on a small random model, taught in the test to answer a few requests."""

import copy
import json

import pytest
import torch
from rich.console import Console

from luthier.adapt import adapter_parameters, attach, detach, disabled
from luthier.core.config import LoraConfig
from luthier.core.errors import DataError
from luthier.data import EncodedRow, collate, render_prompt, to_examples
from luthier.engine import answer_loss, generate, held_out_loss
from luthier.evaluate import Sample, judge, judgement_report
from luthier.evaluate.report import choose_samples, visible

ANSWERS = ['{"task": "refret"}', '{"task": "setup"}', '{"task": "build"}', '{"task": "nut"}', '{"task": "bridge"}']
REQUESTS = ["frets, please", "my action is high", "a guitar for Mara", "these slots are deep", "the top has lifted"]
ROWS = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(REQUESTS, ANSWERS, strict=True)]
SETTINGS = {"max_new_tokens": 17, "batch_rows": 3}


@pytest.fixture(scope="module")
def taught(tiny_llama, tiny_tokenizer):
    """(model with adapter, the base before anything was attached, tokenizer, examples, encoded rows)"""
    torch.set_num_threads(1)
    model = tiny_llama(
        vocab=len(tiny_tokenizer), seed=3, initializer_range=0.3
    )  # so that its features differ enough to learn from
    untouched = copy.deepcopy(model)
    examples = to_examples(ROWS, system="Reply with JSON.")
    encoded = [encoded_row(example, answer, tiny_tokenizer) for example, answer in zip(examples, ANSWERS, strict=True)]
    torch.manual_seed(1)
    attach(model, LoraConfig(r=16, lora_alpha=32))
    optimiser = torch.optim.AdamW([each.parameter for each in adapter_parameters(model)], lr=5e-3, weight_decay=0.0)
    batch = collate(encoded[:4], tiny_tokenizer.pad_token_id)  # the last row is never learnt
    for _ in range(50):
        loss, count = answer_loss(model, batch)
        optimiser.zero_grad()
        (loss / count).backward()
        optimiser.step()
    return model.eval(), untouched, tiny_tokenizer, examples, encoded


@pytest.fixture(scope="module")
def judgement(taught):
    model, _, tokenizer, examples, encoded = taught
    return judge(model, tokenizer, examples, encoded=encoded, **SETTINGS)


def test_base_side_is_what_the_untouched_model_gets(taught, judgement):
    _, untouched, tokenizer, examples, encoded = taught
    alone = judge(untouched, tokenizer, examples, encoded=encoded, **SETTINGS)
    assert judgement.base == alone.base
    assert [sample.base for sample in judgement.samples] == [sample.base for sample in alone.samples]
    answers = generate(untouched, tokenizer, [render_prompt(each, tokenizer) for each in examples], max_new_tokens=17)
    assert judgement.base.cut_off == sum(answer.finish_reason == "length" for answer in answers) > 0
    assert (alone.adapter, alone.p_value, alone.adapters) == (None, None, ())
    assert all(sample.adapter is None and sample.change == "wrong" for sample in alone.samples)


def test_adapter_side_is_what_the_adapted_model_says(taught, judgement):
    model, _, tokenizer, examples, encoded = taught
    answers = generate(model, tokenizer, [render_prompt(each, tokenizer) for each in examples], max_new_tokens=17)
    assert [sample.adapter for sample in judgement.samples] == [answer.text for answer in answers]
    assert judgement.adapter.loss.loss == pytest.approx(held_out_loss(model, encoded, 0).loss, rel=1e-5)
    assert judgement.adapter.cut_off == sum(answer.finish_reason == "length" for answer in answers)
    assert judgement.adapters == ("default",)


def test_what_was_learnt_is_won_and_what_was_not_is_not(judgement):
    assert [sample.change for sample in judgement.samples] == ["won"] * 4 + ["wrong"]
    assert (judgement.won, judgement.lost) == (4, 0)
    assert judgement.p_value == 2 / 2**4
    assert (judgement.base.exact.hits, judgement.adapter.exact.hits, judgement.adapter.exact.n) == (0, 4, 5)
    assert (judgement.adapter.json.exact.hits, judgement.adapter.json.fields["task"].hits) == (4, 4)
    assert judgement.adapter.loss.loss < judgement.base.loss.loss


def test_a_base_that_is_known_is_not_asked_again(taught, judgement):
    model, _, tokenizer, examples, encoded = taught
    steps = []
    told = {"encoded": encoded, "on_progress": lambda *step: steps.append(step), **SETTINGS}
    assert judge(model, tokenizer, examples, known=judgement, **told) == judgement
    assert {stage.split(":")[0] for stage, _, _ in steps} == {"adapter"}
    with pytest.raises(DataError, match="is of other rows"):
        judge(model, tokenizer, examples[1:], known=judgement, **SETTINGS)


def test_inside_a_disabled_block_there_is_no_adapter_to_judge(taught, judgement):
    model, _, tokenizer, examples, _ = taught
    with disabled(model):
        silent = judge(model, tokenizer, examples, **SETTINGS)
    assert silent.adapter is None
    assert silent.base.exact == judgement.base.exact
    assert silent.base.loss is None


def test_as_dict_is_plain_json(judgement):
    plain = json.loads(json.dumps(judgement.as_dict(), allow_nan=False))
    assert (plain["won"], plain["lost"], plain["p_value"], plain["rows"]) == (4, 0, 0.125, 5)
    assert plain["samples"][0]["change"] == "won"
    assert plain["adapter"]["exact"]["low"] == pytest.approx(0.3755, abs=5e-4)  # Wilson, 4 of 5
    assert plain["base"]["loss"]["rows"] == 5


def test_progress_names_each_stage_and_ends(taught):
    model, _, tokenizer, examples, encoded = taught
    steps = []
    judge(model, tokenizer, examples, encoded=encoded, on_progress=lambda *step: steps.append(step), **SETTINGS)
    stages = list(dict.fromkeys(stage for stage, _, _ in steps))
    assert stages == ["base: loss", "base: answers", "adapter: loss", "adapter: answers"]
    assert all((stage, 5, 5) in steps for stage in stages)


def test_references_that_are_words_get_no_json_scores(taught):
    model, _, tokenizer, _, _ = taught
    examples = to_examples([{"prompt": "frets", "completion": "refret"}, {"prompt": "top", "completion": '{"task": "top"}'}])
    assert judge(model, tokenizer, examples, **SETTINGS).adapter.json is None


def test_nothing_to_judge_by_is_refused(taught):
    with pytest.raises(DataError, match="no examples"):
        judge(taught[0], taught[2], [])


def test_detached_model_is_judged_as_base_only(taught):
    model, _, tokenizer, examples, _ = taught
    bare = copy.deepcopy(model)
    detach(bare)
    assert judge(bare, tokenizer, examples, **SETTINGS).adapter is None


def test_report_reads_without_colour(judgement):
    text = printed(judgement_report(judgement, samples=2))
    for words in ("5 held-out rows", "exact match", "80.0 % (38 to 96)", "valid JSON", "field 'task'", "loss per answer token"):
        assert words in text, text
    assert "The adapter won 4 and lost 0 rows" in text
    assert "p = 0.1250" in text
    assert "row 0: WON: only the adapter is right" in text
    assert "max_new_tokens = 17" in text
    assert "\x1b" not in text


def test_shown_samples_take_turns_between_kinds_of_change():
    samples = tuple(a_sample(row, base, adapter) for row, (base, adapter) in enumerate([(0, 1)] * 5 + [(1, 0)] + [(1, 1)] * 3))
    assert [(each.row, each.change) for each in choose_samples(samples, 4)] == [(0, "won"), (5, "lost"), (6, "right"), (1, "won")]
    assert len(choose_samples(samples, 50)) == 9


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    assert visible("a\x1b[2Jb\nc\x07").plain == "a\\x1b[2Jb\nc\\x07"
    assert visible("[bold]not markup[/bold]").plain == "[bold]not markup[/bold]"
    assert visible(" \n").plain == "(empty)"


def encoded_row(example, answer, tokenizer):
    prompt = render_prompt(example, tokenizer)
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return EncodedRow(example.row, prompt + ids, [-100] * len(prompt) + ids)


def a_sample(row, base, adapter):
    return Sample(row, "p", "r", "b", "a", bool(base), bool(adapter))


def printed(renderable):
    console = Console(width=120, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()
