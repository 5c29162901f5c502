"""The preview reads well without colour and hides no control token."""

import io

import pytest
from rich.console import Console
from tests.unit.data import conftest as templates

from luthier.core.errors import ConfigError
from luthier.data import Example, Message
from luthier.data.encode import encode
from luthier.data.preview import preview, row_text


def printed(renderable) -> str:
    console = Console(width=120, color_system=None, file=io.StringIO())
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def qa(question: str, answer: str, row: int = 0) -> Example:
    return Example(row, (Message("user", question), Message("assistant", answer)))


def test_answers_stand_between_marks_with_their_stop_token(make_tokenizer):
    tokenizer = make_tokenizer(templates.FORGETS_THINKING)
    examples = [qa("Grüße [bold]😀", "日本語 [/] 😀", row) for row in range(3)]
    shown = printed(preview(encode(examples, tokenizer, max_length=99), tokenizer, rows=2))
    assert shown.count("«日本語 [/] 😀<|im_end|>»") == 2 and "row 1" in shown and "row 2" not in shown
    assert "<|im_start|>user" in shown and "Grüße [bold]😀" in shown
    assert "<|im_end|> in every row" in shown and "!" not in shown


def test_control_tokens_answers_and_prompt_are_styled_apart(make_tokenizer):
    tokenizer = make_tokenizer(templates.SMOLLM2)
    text = row_text(encode([qa("Q", "A")], tokenizer, max_length=99).rows[0], tokenizer)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["A"] == "bold green" and styles["<|im_start|>"] == "magenta" and "dim" in styles.values()


def test_long_rows_are_shown_by_their_ends(make_tokenizer):
    tokenizer = make_tokenizer(None)
    done = encode([qa("begin " + "x" * 9_999 + " end", "A")], tokenizer, max_length=20_000)
    shown = row_text(done.rows[0], tokenizer).plain
    assert shown.startswith("begin xx") and shown.endswith("xx end\n«A<|im_end|>»") and "tokens ...]" in shown
    assert len(shown) < 1_000


def test_warnings_are_shown(make_tokenizer):
    tokenizer = make_tokenizer(None)
    shown = printed(preview(encode([qa("Q", "long " * 30)], tokenizer, max_length=9), tokenizer))
    assert "! 1 of 1 rows are cut before '<|im_end|>'" in shown and "0 of 1 rows" in shown
    with pytest.raises(ConfigError, match="rows is -1"):
        preview(encode([qa("Q", "A")], tokenizer, max_length=9), tokenizer, rows=-1)
