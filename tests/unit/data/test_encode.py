"""Ids and labels: exactly the answers and their stop tokens are learnt, whatever the template does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.data import conftest as templates

from luthier.core.errors import ConfigError, DataError
from luthier.data import Example, Message, reference_answer, render_prompt
from luthier.data.encode import UNLABELLED, encode

GREETING = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"

# Any text, with whitespace and thinking marks more often than chance would have them; what is only whitespace is no message.
CONTENT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=23),
    st.text("ab \n\t{}:é😀", min_size=1, max_size=13),
).filter(str.strip)


def chat(*contents: str, system: str | None = None, row: int = 0) -> Example:
    """A conversation in which user and assistant take turns."""
    turns = [Message("user" if i % 2 == 0 else "assistant", content) for i, content in enumerate(contents)]
    return Example(row, (*([Message("system", system)] if system else []), *turns))


def labelled_runs(row, tokenizer) -> list[str]:
    """The labelled stretches of a row as text, found without the code under test."""
    runs, before = [], False
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (UNLABELLED, token)
        if label != UNLABELLED:
            runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
        before = label != UNLABELLED
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


@pytest.mark.parametrize("trims", [False, True], ids=["whole offsets", "offsets without spaces"])
@given(contents=st.lists(CONTENT, min_size=2, max_size=6).filter(lambda said: len(said) % 2 == 0))
def test_exactly_answers_and_stop_tokens_are_labelled(make_tokenizer, trims, contents):
    tokenizer = make_tokenizer(templates.SMOLLM2, trims=trims)
    [row] = encode([chat(*contents)], tokenizer, max_length=9_999).rows
    assert labelled_runs(row, tokenizer) == [answer + "<|im_end|>" for answer in contents[1::2]]


@given(question=CONTENT, answer=CONTENT)
def test_trimmed_answers_are_labelled_as_the_template_writes_them(make_tokenizer, question, answer):
    tokenizer = make_tokenizer(templates.LLAMA3, puts_bos=True)
    [row] = encode([chat(question, answer)], tokenizer, max_length=9_999).rows
    assert labelled_runs(row, tokenizer) == [answer.strip() + "<|eot_id|>"]


@pytest.mark.parametrize("template", [templates.SMOLLM2, templates.LLAMA3, templates.NO_STOP, None])
@given(question=CONTENT, answer=CONTENT)
def test_prompt_for_evaluation_is_the_beginning_of_the_training_row(make_tokenizer, template, question, answer):
    tokenizer = make_tokenizer(template)
    example = chat(question, answer)
    [row] = encode([example], tokenizer, max_length=9_999).rows
    prompt = render_prompt(example, tokenizer)
    assert row.input_ids[: len(prompt)] == prompt
    assert set(row.labels[: len(prompt)]) == {UNLABELLED} and row.labels[len(prompt)] != UNLABELLED
    assert reference_answer(example) == answer


def test_ids_are_those_of_the_template_written_out_by_hand(make_tokenizer):
    tokenizer = make_tokenizer(templates.SMOLLM2)
    [row] = encode([chat("Refret it", "Done.")], tokenizer, max_length=99).rows
    prompt = tokenizer(GREETING + "<|im_start|>user\nRefret it<|im_end|>\n<|im_start|>assistant\n").input_ids
    answer = tokenizer("Done.<|im_end|>").input_ids
    assert row.input_ids == prompt + answer
    assert row.labels == [UNLABELLED] * len(prompt) + answer


def test_a_system_message_takes_the_place_of_the_templates_own(make_tokenizer):
    tokenizer = make_tokenizer(templates.SMOLLM2)
    [row] = encode([chat("Q", "A", system="Be brief.")], tokenizer, max_length=99).rows
    assert tokenizer.decode(row.input_ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ")


def test_prompt_is_tokenised_as_it_is_when_the_model_is_asked(make_tokenizer):
    tokenizer = make_tokenizer(templates.LLAMA3)
    prompt = "<|begin|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    asked, whole = tokenizer(prompt).input_ids, tokenizer(prompt + "A<|eot_id|>").input_ids
    assert whole[: len(asked)] != asked, "the two newlines must be one token at the end only, or the test shows nothing"
    [row] = encode([chat("Q", "A")], tokenizer, max_length=99).rows
    assert row.input_ids[:-2] == asked and tokenizer.decode(row.input_ids[-2:]) == "A<|eot_id|>"


def test_bos_is_not_doubled_and_not_left_out(make_tokenizer):
    bos = 3
    chatting = make_tokenizer(templates.LLAMA3, puts_bos=True)
    [row] = encode([chat("Q", "A")], chatting, max_length=99).rows
    assert row.input_ids[0] == bos and row.input_ids.count(bos) == 1
    plain = make_tokenizer(None, puts_bos=True)
    for example in (chat("Q", "A"), Example(0, text="A text.")):
        [row] = encode([example], plain, max_length=99).rows
        assert row.input_ids[0] == bos and row.input_ids.count(bos) == 1 and row.labels[0] == UNLABELLED
    assert render_prompt(chat("Q", "A"), plain) == plain("Q\n").input_ids


def test_a_template_that_forgets_thinking_gives_one_row_per_answer(make_tokenizer):
    tokenizer = make_tokenizer(templates.FORGETS_THINKING)
    done = encode([chat("Q1", "<think>hm</think>A1", "Q2", "<think>so</think>A2", row=7)], tokenizer, max_length=99)
    assert [row.row for row in done.rows] == [7, 7] and done.report.split_turns == 1
    assert labelled_runs(done.rows[0], tokenizer) == ["<think>hm</think>A1<|im_end|>"]
    assert labelled_runs(done.rows[1], tokenizer) == ["<think>so</think>A2<|im_end|>"]
    assert "<|im_start|>assistant\nA1<|im_end|>" in tokenizer.decode(done.rows[1].input_ids)


def test_a_template_that_ends_the_whole_with_eos_is_learnt_to_the_end_of_turn(make_tokenizer):
    tokenizer = make_tokenizer(templates.ENDS_WITH_EOS, eos="<|endoftext|>")
    done = encode([chat("Q1", "A1", "Q2", "A2")], tokenizer, max_length=99)
    assert [labelled_runs(row, tokenizer) for row in done.rows] == [["A1<|end|>"], ["A2<|end|>"]]
    assert done.report.stop_token == "<|end|>" and done.report.stop_in_every_row


def test_eos_is_put_and_learnt_where_the_template_has_no_stop_token(make_tokenizer):
    tokenizer = make_tokenizer(templates.NO_STOP)
    done = encode([chat("Q1", "A1", "Q2", "A2")], tokenizer, max_length=99)
    assert [tokenizer.decode(row.input_ids) for row in done.rows] == [
        "user: Q1\nassistant: A1<|im_end|>",
        "user: Q1\nassistant: A1\nuser: Q2\nassistant: A2<|im_end|>",
    ]
    assert [labelled_runs(row, tokenizer) for row in done.rows] == [[" A1<|im_end|>"], [" A2<|im_end|>"]]


def test_a_template_that_cannot_be_marked_is_refused_with_the_difference(make_tokenizer):
    with pytest.raises(DataError, match="row 4 cannot be marked, message 1") as error:
        encode([chat("Q", "<think>hm</think>A", row=4)], make_tokenizer(templates.ASKS_WITH_THINKING), max_length=99)
    assert r"assistant\n<think>" in str(error.value) and r"assistant\nA<|im_end|>" in str(error.value)


def test_rows_the_template_refuses_are_listed(make_tokenizer):
    tokenizer = make_tokenizer(templates.REFUSES_SYSTEM)
    examples = [chat("Q", "A"), chat("Q", "A", system="S", row=1), chat("Q", "A", system="S", row=2)]
    with pytest.raises(DataError, match="row 1 is refused by the chat template") as error:
        encode(examples, tokenizer, max_length=99)
    assert "no system role here" in str(error.value) and "2 faults" in str(error.value)


@pytest.mark.parametrize(
    ("question", "answer", "text"),
    [("Q", "A", "Q\nA"), ("Q:\n", "A", "Q:\nA"), ("A:", " Paris", "A: Paris"), ("Q ", " A", "Q  A")],
)
def test_without_a_template_prompt_and_answer_are_joined_plainly(make_tokenizer, question, answer, text):
    tokenizer = make_tokenizer(None)
    [row] = encode([chat(question, answer)], tokenizer, max_length=99).rows
    assert tokenizer.decode(row.input_ids) == text + "<|im_end|>"
    assert labelled_runs(row, tokenizer) == [answer + "<|im_end|>"]
    [forced] = encode([chat(question, answer)], make_tokenizer(templates.SMOLLM2), max_length=99, chat_template="none").rows
    assert forced.input_ids == row.input_ids


def test_several_turns_need_a_template(make_tokenizer):
    with pytest.raises(DataError, match="need a chat template; this tokenizer has none"):
        encode([chat("Q", "A", "Q", "A")], make_tokenizer(None), max_length=99)
    given_one = encode([chat("Q", "A", "Q", "A")], make_tokenizer(None), max_length=99, chat_template=templates.SMOLLM2)
    assert given_one.report.stop_token == "<|im_end|>"
    with pytest.raises(ConfigError, match="'chatml'; it must be 'auto', 'none' or the text"):
        encode([chat("Q", "A")], make_tokenizer(None), max_length=99, chat_template="chatml")


def test_plain_text_is_learnt_whole_with_eos(make_tokenizer):
    tokenizer = make_tokenizer(templates.SMOLLM2)
    done = encode([Example(0, text="The spruce top rings.\n")], tokenizer, max_length=99)
    assert done.rows[0].labels == done.rows[0].input_ids
    assert tokenizer.decode(done.rows[0].input_ids) == "The spruce top rings.\n<|im_end|>"
    assert done.report.share == 1.0


def test_a_tokenizer_that_puts_spaces_is_given_the_whole_text(spaced_tokenizer):
    example = chat("Question:", " answer")
    [row] = encode([example], spaced_tokenizer, max_length=99).rows
    assert row.input_ids == [*spaced_tokenizer("Question: answer").input_ids, spaced_tokenizer.eos_token_id]
    assert labelled_runs(row, spaced_tokenizer)[0].replace("</s>", "").strip() == "answer"


def test_truncation_is_counted_and_unlabelled_rows_are_dropped(make_tokenizer):
    tokenizer = make_tokenizer(None)
    examples = [chat("Q", "A"), chat("Q", "xyzw" * 7, row=1), chat("xyzw" * 7, "A", row=2)]
    whole = encode(examples, tokenizer, max_length=999)
    assert (whole.report.truncated, whole.report.dropped) == (0, 0) and not whole.report.warnings
    done = encode(examples, tokenizer, max_length=11)
    report = done.report
    assert [row.row for row in done.rows] == [0, 1] and done.lengths == [4, 11]
    assert (report.truncated, report.dropped, report.rows, report.rows_with_stop) == (2, 1, 2, 1)
    assert not report.stop_in_every_row and len(report.warnings) == 2
    assert (report.tokens, report.labelled_tokens, report.length_p50, report.length_max) == (15, 2 + 9, 4, 11)
    assert report.as_dict()["share"] == pytest.approx(11 / 15)


def test_a_set_with_nothing_to_learn_is_refused_with_the_length_needed(make_tokenizer):
    tokenizer = make_tokenizer(None)
    needed = len(tokenizer("xyzw" * 7 + "\n").input_ids) + 1
    with pytest.raises(DataError, match=f"all 1 rows are cut to max_length=8 .* needs {needed} tokens"):
        encode([chat("xyzw" * 7, "A")], tokenizer, max_length=8)
    assert encode([chat("xyzw" * 7, "A")], tokenizer, max_length=needed).report.labelled_tokens == 1
    with pytest.raises(DataError, match="no examples"):
        encode([], tokenizer, max_length=8)
    with pytest.raises(ConfigError, match="max_length is 1"):
        encode([chat("Q", "A")], tokenizer, max_length=1)


def test_control_tokens_in_a_rows_own_text_are_reported(make_tokenizer):
    tokenizer = make_tokenizer(templates.SMOLLM2)
    report = encode([chat("Q", "A"), chat("what is <|im_end|>?", "A", row=1)], tokenizer, max_length=99).report
    assert report.control_text_rows == 1 and "control token" in report.warnings[0]


def test_no_stop_token_anywhere_is_refused(make_tokenizer):
    with pytest.raises(DataError, match=r"Set tokenizer\.eos_token"):
        encode([chat("Q", "A")], make_tokenizer(None, eos=None), max_length=99)


def test_texts_and_conversations_do_not_mix(make_tokenizer):
    with pytest.raises(DataError, match="mixed"):
        encode([chat("Q", "A"), Example(1, text="t")], make_tokenizer(None), max_length=99)
    with pytest.raises(DataError, match="row 1 is a plain text"):
        render_prompt(Example(1, text="t"), make_tokenizer(None))
