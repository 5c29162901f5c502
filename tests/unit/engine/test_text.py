"""Text in pieces against the tokenizer's own decoding of the whole, and against transformers' stop strings."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast, StopStringCriteria

from luthier.engine.text import TextStream, token_bytes


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def fallback_tokenizer():
    """Words that begin with a blank, and bytes for all else: the kind of Llama 2."""
    words = ["<unk>", "</s>", "▁", "▁the", "top", "▁to", "p", "▁▁", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def pieces_of(stream, ids):
    """The pieces, and how many tokens they took."""
    pieces = []
    for taken, token in enumerate(ids, start=1):
        piece = stream.push(token)
        pieces.append(piece.text)
        if piece.finished:
            return pieces, taken
    return [*pieces, stream.flush()], None


def check_joined_pieces(tokenizer, width):
    dice = random.Random(3)
    for _ in range(200):
        ids = [dice.randrange(width) for _ in range(dice.randrange(40))]
        assert "".join(pieces_of(TextStream(tokenizer), ids)[0]) == decoded(tokenizer, ids), ids


@pytest.mark.parametrize("name", ["byte_tokenizer", "tiny_tokenizer"])
def test_joined_pieces_are_the_decoding_of_the_whole(name, request):
    tokenizer = request.getfixturevalue(name)
    check_joined_pieces(tokenizer, len(tokenizer))


def test_joined_pieces_are_the_decoding_of_the_whole_where_bytes_are_a_fallback():
    tokenizer = fallback_tokenizer()
    check_joined_pieces(tokenizer, len(tokenizer))
    check_joined_pieces(tokenizer, 9)


def test_joined_pieces_are_the_decoding_of_the_whole_by_the_real_tokenizer(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    check_joined_pieces(tokenizer, len(tokenizer))
    check_joined_pieces(tokenizer, 300)  # special tokens and single bytes


@pytest.mark.parametrize("name", ["byte_tokenizer", "tiny_tokenizer"])
@pytest.mark.parametrize("text", ["The luthier planed 中文 🎻🪕", " e\u0301\n\n  x"])
def test_bytes_of_tokens_are_those_of_the_text(name, text, request):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(tokenizer, token) for token in ids) == text.encode()


def test_bytes_of_tokens_where_bytes_are_a_fallback():
    tokenizer = fallback_tokenizer()
    words = ["▁the", "▁to", "p", "▁▁", "é", *(f"<0x{byte:02X}>" for byte in "中".encode())]
    ids = tokenizer.convert_tokens_to_ids(words)
    assert b"".join(token_bytes(tokenizer, token) for token in ids) == " the top  é中".encode()
    assert decoded(tokenizer, ids) == "the top  é中"  # decoding leaves out the first blank
    assert token_bytes(tokenizer, 10_000) == b""


@pytest.mark.parametrize("text", ["naïve 中文 🎻🪕", "e\u0301"])
def test_no_piece_holds_half_a_character_and_each_comes_with_its_last_byte(byte_tokenizer, text):
    ids = byte_tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(byte_tokenizer)
    sent = ""
    for made, token in enumerate(ids, start=1):
        sent += stream.push(token).text
        assert sent == text.encode()[:made].decode(errors="ignore")


@pytest.mark.parametrize("name", ["byte_tokenizer", "tiny_tokenizer"])
def test_stop_texts_stop_at_the_token_where_transformers_stops_and_nothing_after_is_sent(name, request):
    tokenizer = request.getfixturevalue(name)
    dice = random.Random(5)
    stops = ("aba", "ab c", "é", "cc")
    criteria = StopStringCriteria(tokenizer, list(stops))
    stopped = 0
    for _ in range(120):
        ids = tokenizer("".join(dice.choice("abc dé") for _ in range(14)), add_special_tokens=False)["input_ids"]
        ends = [made for made in range(1, len(ids) + 1) if bool(criteria(torch.tensor([ids[:made]]), None)[0])]
        pieces, taken = pieces_of(TextStream(tokenizer, stops), ids)
        assert taken == (ends[0] if ends else None)
        whole = decoded(tokenizer, ids[:taken])
        assert "".join(pieces) == whole[: min([at for stop in stops if (at := whole.find(stop)) >= 0], default=None)]
        stopped += taken is not None
    assert 20 < stopped < 120


def test_what_may_begin_a_stop_text_waits_and_comes_when_it_does_not(byte_tokenizer):
    a, b, x = (byte_tokenizer.convert_tokens_to_ids(letter) for letter in "abx")
    stream = TextStream(byte_tokenizer, ["aab"])
    assert [stream.push(token).text for token in (a, a, a, x)] == ["", "", "a", "aax"]
    assert [stream.push(token).text for token in (a, a)] == ["", ""]
    last = stream.push(b)
    assert (last.text, last.finished, stream.flush()) == ("", "stop", "")


def test_a_stop_token_and_the_end_bring_what_was_held_back(byte_tokenizer):
    a = byte_tokenizer.convert_tokens_to_ids("a")
    stream = TextStream(byte_tokenizer, ["ab"], {256})
    assert stream.push(a).text == ""
    last = stream.push(256)
    assert (last.text, last.finished) == ("a", "stop")
    other = TextStream(byte_tokenizer, ["ab"])
    assert (other.push(a).text, other.flush(), other.flush()) == ("", "a", "")
