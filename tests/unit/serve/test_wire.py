"""Messages between the gateway and the engine's process: what goes in comes out, whatever it holds."""

import asyncio
import inspect
import json
import socket
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core import errors
from luthier.core.errors import ConfigError, EngineError, LuthierError, MissingExtraError, QueueFullError, StorageError
from luthier.engine.jobs import Event
from luthier.engine.requests import Completion, Constraint, Sampling, TokenLogprob
from luthier.serve.backend import Ask
from luthier.serve.wire import Answer, ask_message, error_fields, error_of, frame, part_of, read_ask, read_message

floats = st.floats(allow_nan=False)
ids = st.integers(min_value=0, max_value=2**31)
logprobs = st.builds(TokenLogprob, ids, floats, st.lists(st.tuples(ids, floats), max_size=3).map(tuple))
events = st.builds(
    Event, st.text(st.characters(codec="utf-8")), st.lists(ids, max_size=3).map(tuple), st.lists(logprobs, max_size=3).map(tuple)
)


def crossed(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message after it went through a real socket."""

    async def cross() -> dict[str, Any]:
        ours, theirs = socket.socketpair()
        _, writer = await asyncio.open_connection(sock=ours)
        reader, other = await asyncio.open_connection(sock=theirs)
        writer.write(frame(message))
        found = await read_message(reader)
        for each in (writer, other):
            each.close()
            await each.wait_closed()
        assert found is not None
        return found

    return asyncio.run(cross())


@given(st.lists(events, max_size=4), st.booleans())
def test_an_answer_is_put_together_again(made: list[Event], with_logprobs: bool) -> None:
    whole = Completion(
        text="".join(each.text for each in made),
        token_ids=tuple(token for each in made for token in each.token_ids),
        finish_reason="stop",
        prompt_tokens=7,
        cached_tokens=3,
        logprobs=tuple(value for each in made for value in each.logprobs) if with_logprobs else None,
        queue_seconds=0.25,
    )
    last = Event("", (), (), whole)
    parts = json.loads(json.dumps([part_of("r", event) for event in [*made, last]]))
    answer = Answer()
    found = [answer.event(part) for part in parts]
    assert found[:-1] == made
    assert found[-1].completion == whole and found[-1].completion.queue_seconds == 0.25


def test_a_request_crosses_whole() -> None:
    schema = {"type": "object", "properties": {"z": {"const": "é\u2028"}, "a": {"type": "integer"}}}
    sampling = Sampling(
        temperature=0.5, seed=2**62, stop=("\n",), logit_bias={5: -3.5}, constraint=Constraint(json_schema=schema)
    )
    ask = Ask("req-1", (0, 5, 9), "orders:3", sampling, "acme")
    found = read_ask(crossed(ask_message(ask)))
    assert found == ask
    assert list(found.sampling.constraint.json_schema["properties"]) == ["z", "a"]


def errors_of_the_tree() -> list[LuthierError]:
    """One error of each class, as its own constructor makes it."""
    special = {
        "MissingExtraError": MissingExtraError("numpy", "data", "this"),
        "QueueFullError": QueueFullError("the queue of t", 7, 5),
        "StorageError": StorageError(28, "No space left on device", "/data/x"),
        "ConfigError": ConfigError("two faults", ["one", "two"]),
    }
    classes = [each for each in vars(errors).values() if inspect.isclass(each) and issubclass(each, LuthierError)]
    return [special.get(each.__name__) or each(f"a message of {each.__name__}") for each in classes]


@pytest.mark.parametrize("error", errors_of_the_tree(), ids=lambda error: type(error).__name__)
def test_every_error_crosses_as_itself(error: LuthierError) -> None:
    found = error_of(crossed(error_fields(error)))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert {key: value for key, value in vars(found).items() if value is not None} == {
        key: value for key, value in vars(error).items() if value is not None
    }


def test_other_errors_are_the_engines_fault() -> None:
    found = error_of(crossed(error_fields(MemoryError("not enough"))))
    assert type(found) is EngineError and str(found) == "MemoryError: not enough"
    assert type(error_of({"class": "SystemExit", "message": "x", "fields": {}})) is EngineError
    assert type(error_of({"class": "annotations", "message": "x", "fields": {}})) is EngineError


@pytest.mark.parametrize(
    "sent", [b"", b"\x00\x00", struct.pack("!I", 20) + b'{"kind":'], ids=["nothing", "half a head", "half a body"]
)
def test_the_end_in_the_middle_of_a_message_is_an_end(sent: bytes) -> None:
    async def read() -> Any:
        reader = asyncio.StreamReader()
        reader.feed_data(sent)
        reader.feed_eof()
        return await read_message(reader)

    assert asyncio.run(read()) is None
