"""Traces arrive at a real receiver of OTLP over HTTP, as protobuf, and continue the caller's."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.otlp_collector import attributes, collector

from luthier.engine.jobs import Event
from luthier.engine.requests import Completion
from luthier.registry.tenancy import Scope
from luthier.registry.view import Caller
from luthier.serve.observing import Observed
from luthier.serve.telemetry import Traces

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[Any]]]:
    with collector() as found:
        yield found


def notes_of(traceparent: str | None) -> Observed:
    caller = Caller(1, "acme", 1, "laptop", frozenset({Scope.INFERENCE}))
    notes = Observed("req-1", "POST", "/v1/chat/completions", traceparent, caller=caller, status=200)
    answer = notes.answer("orders", "orders:3", (1, 2, 3))
    time.sleep(0.03)
    answer.saw(Event("x", (5,)))
    answer.saw(Event("", (), (), Completion("x", (5,), "stop", 3, queue_seconds=0.01)))
    notes.seconds = time.monotonic() - notes.began
    return notes


def test_spans_arrive_and_continue_the_callers_trace(receiver) -> None:
    url, spans = receiver
    traces = Traces(url)
    traces(notes_of(f"00-{TRACE}-{PARENT}-01"))
    traces.close()
    by_name = {span.name: span for span in spans}
    assert set(by_name) == {"POST /v1/chat/completions", "queue", "generate"}
    request, queue, generate = by_name["POST /v1/chat/completions"], by_name["queue"], by_name["generate"]
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    assert request.parent_span_id.hex() == PARENT
    assert queue.parent_span_id == generate.parent_span_id == request.span_id
    assert request.start_time_unix_nano <= queue.start_time_unix_nano <= queue.end_time_unix_nano
    assert queue.end_time_unix_nano == generate.start_time_unix_nano
    assert generate.end_time_unix_nano <= request.end_time_unix_nano
    assert queue.end_time_unix_nano - queue.start_time_unix_nano == pytest.approx(10_000_000, abs=1_000)
    assert attributes(request)["luthier.tenant"] == "acme" and attributes(request)["http.response.status_code"] == 200
    assert attributes(generate)["luthier.adapter"] == "orders:3" and attributes(generate)["gen_ai.usage.output_tokens"] == 1


@pytest.mark.parametrize("traceparent", [None, "00-zz-1-01", f"00-{'0' * 32}-{PARENT}-01", "x" * 5000])
def test_without_a_trace_that_is_one_a_new_one_begins(receiver, traceparent: str | None) -> None:
    url, spans = receiver
    traces = Traces(url)
    traces(notes_of(traceparent))
    traces.close()
    [request] = [span for span in spans if span.name.startswith("POST")]
    assert request.parent_span_id == b"" and len(request.trace_id) == 16 and request.trace_id != bytes(16)


def test_an_unsampled_caller_is_not_traced(receiver) -> None:
    url, spans = receiver
    traces = Traces(url)
    traces(notes_of(f"00-{TRACE}-{PARENT}-00"))
    traces.close()
    assert spans == []
