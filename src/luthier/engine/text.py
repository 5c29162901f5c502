"""Text from tokens as they come: no half characters, nothing after a stop text, nothing that a stop text may begin with.

Joined, the pieces are the decoding of the whole answer (special tokens skipped, no clean-up), at a cost per token that does
not grow with the answer.
"""

import codecs
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

UNDECIDED = "\ufffd"  # what tokenizers write for bytes that are no character, and for one whose last bytes are missing
BYTE_LEVEL = {
    chr(code): byte
    for byte, code in zip(
        [*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173],
        [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)],
        strict=True,
    )
}  # GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from 256 on


@dataclass(frozen=True)
class Piece:
    """Text that is final, perhaps none; `finished` is "stop" with the last one."""

    text: str
    finished: Literal["stop"] | None = None


class TextStream:
    """Turns the tokens of one answer into pieces of text. After a piece that is finished there is nothing more to push."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), stop_ids: Collection[int] = frozenset()):
        self.stop, self.stop_ids = tuple(stop), frozenset(stop_ids)
        self.decoder = _decoder(tokenizer)
        self.held = ""
        self.is_finished = False
        self._longest = max(map(len, self.stop), default=0)

    def push(self, token: int) -> Piece:
        """Return the text that is final now that `token` has come."""
        assert not self.is_finished, "nothing comes after the end of an answer"
        if token in self.stop_ids:
            return Piece(self.flush(), "stop")
        return self._checked(self.decoder.push(token), is_last=False)

    def flush(self) -> str:
        """End the answer, and return what was held back."""
        if self.is_finished:
            return ""
        rest = self._checked(self.decoder.flush(), is_last=True)
        self.is_finished = True
        return rest.text

    def _checked(self, text: str, *, is_last: bool) -> Piece:
        text = self.held + text
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if places:
            self.is_finished = True
            return Piece(text[: min(places)], "stop")
        kept = 0 if is_last else self._may_begin_a_stop(text)
        self.held = text[len(text) - kept :]
        return Piece(text[: len(text) - kept])

    def _may_begin_a_stop(self, text: str) -> int:
        """How many of the last characters are the beginning of a stop text."""
        for number in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-number:]) for stop in self.stop):
                return number
        return 0


class _Decoder(Protocol):
    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class _Bytes:
    """For byte-level tokenizers, whose tokens are bytes whatever their neighbours are."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.skipped = _special_ids(tokenizer)
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self.utf8.decode(b"" if token in self.skipped else self._bytes(token))

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        return _bytes_of(self.tokenizer.convert_ids_to_tokens(token))


class _Window:
    """For all others: decodes the last tokens with those just before them, because a first token is often decoded specially."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.skipped = _special_ids(tokenizer)
        self.window: list[int] = []
        self.num_before = 0  # tokens of the window that are there as neighbours only
        self.num_sent = 0  # characters of the window's text that are final

    def push(self, token: int) -> str:
        if token in self.skipped:
            return ""  # a run of bytes goes on behind it
        self.window.append(token)
        if _is_byte(self.tokenizer.convert_ids_to_tokens(token)):
            return ""  # one wrong byte changes how the whole run of bytes is decoded
        text = self._decode(self.window)
        if text.endswith(UNDECIDED) or len(text) <= self.num_sent:
            return ""
        new = text[self.num_sent :]
        self.window, self.num_before = self.window[self.num_before :], len(self.window) - self.num_before
        self.num_sent = len(self._decode(self.window))
        return new

    def flush(self) -> str:
        return self._decode(self.window)[self.num_sent :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes that one token stands for, special or not; none for a token of a padded vocabulary.

    Where tokens are bytes, those of an answer joined are the bytes of its text. Other tokenizers may write a first token
    differently (without its space).
    """
    word = tokenizer.convert_ids_to_tokens(token)
    if _is_byte_level(tokenizer):
        return _bytes_of(word)
    if _is_byte(word):
        return bytes([int(word[3:5], 16)])
    return (word or "").replace("\u2581", " ").encode()  # SentencePiece's sign for a space


def _bytes_of(word: str | None) -> bytes:
    """The bytes of a token of a byte-level tokenizer. None: the model's vocabulary is padded."""
    if all(letter in BYTE_LEVEL for letter in word or ""):
        return bytes(BYTE_LEVEL[letter] for letter in word or "")
    return (word or "").encode()  # an added token, which is text as it stands


def _decoder(tokenizer: Any) -> _Decoder:
    return _Bytes(tokenizer) if _is_byte_level(tokenizer) else _Window(tokenizer)


def _is_byte_level(tokenizer: Any) -> bool:
    return type(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)).__name__ == "ByteLevel"


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that decoding skips: those named (end, padding) and all others that were added as special."""
    added = {token for token, each in tokenizer.added_tokens_decoder.items() if each.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _is_byte(word: str | None) -> bool:
    """Whether the token is a byte of a tokenizer that falls back to bytes, as <0xE4>."""
    return word is not None and len(word) == 6 and word.startswith("<0x") and word.endswith(">")
