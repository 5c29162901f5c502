"""What a token is as text and as bytes, for log-probabilities in OpenAI's two forms."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from luthier.engine.requests import TokenLogprob
from luthier.engine.text import token_bytes
from luthier.serve.chat_bodies import LikelyToken, TokenInPlace

LEAST = -9999.0
"""What OpenAI's API writes for a token that is as good as impossible; JSON has no infinity."""


class TokenTexts:
    """Texts of single tokens of one tokenizer."""

    def __init__(self, tokenizer: Any):
        self._bytes = lru_cache(maxsize=65536)(lambda token: token_bytes(tokenizer, token))

    def text(self, token: int) -> str:
        """Return a token's text; bytes that are no whole character are shown as U+FFFD."""
        return self._bytes(token).decode("utf-8", errors="replace")

    def likely(self, token: int, logprob: float) -> LikelyToken:
        """Return a token as the chat route shows it."""
        return LikelyToken(token=self.text(token), logprob=max(logprob, LEAST), bytes=list(self._bytes(token)))

    def in_place(self, tokens: Iterable[TokenLogprob]) -> list[TokenInPlace]:
        """Return tokens of an answer as the chat route shows them."""
        return [
            TokenInPlace(
                **self.likely(each.token, each.logprob).model_dump(),
                top_logprobs=[self.likely(*other) for other in each.alternatives],
            )
            for each in tokens
        ]

    def in_columns(self, tokens: Sequence[TokenLogprob], offset: int, asked: int) -> dict[str, Any]:
        """Return tokens of an answer as the completions route shows them; `offset` is where the first one's text begins."""
        texts = [self.text(each.token) for each in tokens]
        offsets = [offset]
        for text in texts[:-1]:
            offsets.append(offsets[-1] + len(text))
        top = [
            {self.text(token): max(logprob, LEAST) for token, logprob in (*each.alternatives, (each.token, each.logprob))}
            for each in tokens
        ]
        return {
            "tokens": texts,
            "token_logprobs": [max(each.logprob, LEAST) for each in tokens],
            "top_logprobs": top if asked else None,
            "text_offset": offsets[: len(texts)],
        }
