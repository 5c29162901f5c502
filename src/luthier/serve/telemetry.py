"""Traces: for each request the spans request -> queue -> generate, sent over OTLP/HTTP where an address was given.

    request     from the first byte to the last; continues the caller's trace where it sent a W3C traceparent
      queue     an answer waits in the engine
      generate  its prompt is read and its tokens are drawn

Spans are made when the request is over, from the times that were noted, so nothing is carried along while it runs. They hold
names and counts, never prompts.
"""

from typing import Any

from luthier.core.errors import MissingExtraError
from luthier.serve.observing import AnswerNotes, Observed

NS = 1_000_000_000


class Traces:
    """Sends spans to `url` (as http://127.0.0.1:4318/v1/traces), in batches from a thread of its own.

    Raises: MissingExtraError without the extra `telemetry`.
    """

    def __init__(self, url: str, *, service: str = "luthier"):
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise MissingExtraError("opentelemetry-sdk", "telemetry", "--otlp") from error
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("luthier.serve")

    def __call__(self, notes: Observed) -> None:
        """Make the spans of a request that is over."""
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {"traceparent": notes.traceparent} if notes.traceparent else {}
        parent = TraceContextTextMapPropagator().extract(carrier)
        begin = int(notes.at * NS)
        span = self._tracer.start_span(
            f"{notes.method} {notes.route}", parent, SpanKind.SERVER, _known(_attributes(notes)), start_time=begin
        )
        inside = set_span_in_context(span)
        for answer in notes.answers:
            self._answer(answer, inside, begin + int((answer.began - notes.began) * NS), begin + int(notes.seconds * NS))
        if notes.status >= 500:
            from opentelemetry.trace import Status, StatusCode

            span.set_status(Status(StatusCode.ERROR))
        span.end(begin + int(notes.seconds * NS))

    def _answer(self, answer: AnswerNotes, inside: Any, begin: int, end: int) -> None:
        ran = begin if answer.queue_seconds is None else min(end, begin + int(answer.queue_seconds * NS))
        if answer.queue_seconds is not None:
            self._tracer.start_span("queue", inside, start_time=begin).end(ran)
        told = {
            "luthier.adapter": answer.adapter,
            "gen_ai.usage.input_tokens": answer.prompt_tokens,
            "gen_ai.usage.output_tokens": answer.new_tokens,
            "luthier.cached_tokens": answer.cached_tokens,
            "luthier.finish_reason": answer.finish_reason,
        }
        last = end if answer.last_token_seconds is None else min(end, begin + int(answer.last_token_seconds * NS))
        self._tracer.start_span("generate", inside, attributes=_known(told), start_time=ran).end(max(ran, last))

    def close(self) -> None:
        """Send what is left, and end the thread. Waits for the receiver for a few seconds at most."""
        self._provider.shutdown()


def _attributes(notes: Observed) -> dict[str, Any]:
    return {
        "http.request.method": notes.method,
        "http.route": notes.route,
        "http.response.status_code": notes.status,
        "gen_ai.request.model": notes.model,
        "luthier.request_id": notes.id,
        "luthier.tenant": None if notes.caller is None else notes.caller.tenant,
    }


def _known(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}
