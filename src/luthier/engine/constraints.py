"""Answers of a given form: JSON of a schema, a regular expression, one of some texts, a grammar.

llguidance says which tokens may come next; `drawing.constrained` takes the others out of the logits. An answer that reaches its
end has the form. One that max_new_tokens or a stop text cuts off may not: its finish reason says "length" for the former.

A matcher knows forced tokens (`LLMatcher.compute_ff_tokens`); a runner that takes them without a forward pass would start there.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import numpy as np

from luthier.core.errors import ConfigError, MissingExtraError
from luthier.engine.requests import Constraint

# At most so much white space in one place: a model that is not sure would go on with blanks until its tokens are used up.
WHITESPACE = r"[ \n\t]{1,24}"


class Constraints:
    """The constraints of one tokenizer, compiled once each and kept while among the `limit` last used.

    `vocabulary` is the width of the model's logits, `stop_ids` the tokens an answer may end with. Threads may share it.
    Raises: MissingExtraError without llguidance, ConfigError for a tokenizer that it cannot read.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, stop_ids: Collection[int], *, limit: int = 128):
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise MissingExtraError("llguidance", "structured", "an answer of a given form") from error
        # A model's vocabulary may be padded; llguidance takes none of the tokens that only the model has.
        ends = sorted(token for token in stop_ids if token < len(tokenizer))
        if not ends:
            raise ConfigError("an answer of a given form ends with a stop token, but the model has none; name one (eos_token)")
        self._library = llguidance
        width = max(vocabulary, len(tokenizer))
        try:
            self._tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=width, eos_token=ends)
        except ValueError as error:
            raise ConfigError(f"llguidance cannot read this tokenizer ({type(tokenizer).__name__}): {error}") from error
        self._limit = limit
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint) -> "GrammarMatcher":
        """Return a matcher at the beginning of an answer.

        Raises: ConfigError for a constraint that no text can meet or that llguidance does not know, with its reason.
        """
        key = constraint.model_dump_json(exclude_none=True)
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = self._compile(constraint)
            self._compiled.move_to_end(key)
            while len(self._compiled) > self._limit:
                self._compiled.popitem(last=False)
            return GrammarMatcher(self._compiled[key].deep_copy())

    def _compile(self, constraint: Constraint) -> Any:
        matcher = self._library.LLMatcher(self._tokens, _grammar(self._library.LLMatcher, constraint), log_level=0)
        if matcher.is_error():
            (form,) = constraint.model_dump(exclude_none=True)
            raise ConfigError(f"this {form} cannot be used as a constraint: {matcher.get_error().strip()}")
        return matcher


class GrammarMatcher:
    """The place of one answer in its constraint."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def allowed(self, vocabulary: int) -> "np.ndarray":
        """Return which tokens may come next, as booleans (V)."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed_V = np.zeros(vocabulary, dtype=bool)
        known = np.unpackbits(bits, bitorder="little")[:vocabulary]
        allowed_V[: len(known)] = known
        return allowed_V

    def take(self, token: int) -> None:
        """Go on past `token`; `fault` says so where that was not possible."""
        self._matcher.consume_token(token)

    @property
    def is_accepting(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def fault(self) -> str | None:
        """Why the constraint cannot go on (a token it forbids, a grammar that grew too large), or None."""
        return self._matcher.get_error() or None


def _grammar(library: Any, constraint: Constraint) -> str:
    schema = {"type": "object"} if constraint.json_object else constraint.json_schema
    if schema is not None:
        return str(library.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE}))
    if constraint.regex is not None:
        return str(library.grammar_from_regex(constraint.regex))
    if constraint.choice is not None:
        return str(library.grammar_from_lark("start: " + " | ".join(map(json.dumps, constraint.choice))))
    return str(library.grammar_from_lark(constraint.grammar))
