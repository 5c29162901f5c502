"""GET /metrics: what Prometheus reads, for keys with the scope `admin`. The number of series has a bound, whatever is asked for.

Labels are a status class, a route as it was declared, and names of adapters and tenants that exist, of which only the busiest
have a label of their own; all others count as "other". A name that is busy later takes the place of one that no longer is: that
one's series ends there, as it would with a restart.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Header, Request, Response

from luthier.registry.tenancy import Scope
from luthier.serve.observing import GONE, Observed

router = APIRouter()

OTHER = "other"
LABELLED = 32
"""So many adapters, and so many tenants, have labels of their own."""

FORGET_AFTER = 10_000
"""After so many requests what was counted before counts half, to tell who is busy now."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHORT = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
LONG = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)
STATES = ("known", "loading", "resident", "draining", "failed")


class Busiest:
    """Which names have a label: at most `limit`, chosen by traffic. Remembers counts of four times as many others."""

    def __init__(self, limit: int = LABELLED):
        self.limit = limit
        self._shown: Counter[str] = Counter()
        self._others: Counter[str] = Counter()
        self._seen = 0

    def label(self, name: str) -> tuple[str, str | None]:
        """Count one use of a name; return its label, and the name that has just lost its own to it, if one has."""
        self._forget()
        if name in self._shown or len(self._shown) < self.limit:
            self._shown[name] += 1
            return name, None
        if name not in self._others and len(self._others) >= 4 * self.limit:
            del self._others[min(self._others, key=self._others.__getitem__)]
        self._others[name] += 1
        least = min(self._shown, key=self._shown.__getitem__)
        if self._others[name] <= 2 * self._shown[least]:  # twice, or two of like traffic would change places for ever
            return OTHER, None
        self._shown[name] = self._others.pop(name)
        self._others[least] = self._shown.pop(least)
        return name, least

    def _forget(self) -> None:
        self._seen += 1
        if self._seen % FORGET_AFTER == 0:
            for counts in (self._shown, self._others):
                for name in list(counts):
                    counts[name] //= 2


class Histogram:
    """Counts of seconds by upper bounds."""

    def __init__(self, bounds: Iterable[float]):
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def add(self, value: float | None) -> None:
        """Count a value; None is none."""
        if value is not None:
            place = next((place for place, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))
            self.counts[place] += 1
            self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, how many are at most that), the last one being all."""
        total, found = 0, []
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            found.append((str(bound), float(total)))
        return found


class Metrics:
    """Counts requests as they end (`observe`), and tells them with the engine's own figures (`text`)."""

    def __init__(self, *, labelled: int = LABELLED, view_age: Callable[[], float | None] = lambda: None):
        self._view_age = view_age
        self._adapters, self._tenants = Busiest(labelled), Busiest(labelled)
        self._requests: Counter[tuple[str, str]] = Counter()
        self._by_adapter: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._by_tenant: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._seconds = {
            "request": (Histogram(LONG), "of requests, from the first byte to the last"),
            "first_token": (Histogram(LONG), "until an answer's first token"),
            "token": (Histogram(SHORT), "for each further token of an answer"),
            "queue": (Histogram(LONG), "that an answer waited in the engine before its prompt was read"),
        }

    def observe(self, notes: Observed) -> None:
        """Count a request that is over."""
        self._requests[notes.route, status_class(notes.status)] += 1
        if notes.caller is not None:
            counts = self._counts(self._by_tenant, self._tenants, notes.caller.tenant)
            counts["requests"] += 1
            for answer in notes.answers:
                counts["prompt"] += answer.prompt_tokens
                counts["cached"] += answer.cached_tokens
                counts["new"] += answer.new_tokens
        if notes.answers:
            self._seconds["request"][0].add(notes.seconds)
        for answer in notes.answers:
            counts = self._counts(self._by_adapter, self._adapters, answer.adapter or "base")
            counts["requests"] += 1
            counts["prompt"] += answer.prompt_tokens
            counts["cached"] += answer.cached_tokens
            counts["new"] += answer.new_tokens
            self._seconds["first_token"][0].add(answer.first_token_seconds)
            self._seconds["token"][0].add(answer.token_seconds)
            self._seconds["queue"][0].add(answer.queue_seconds)

    def _counts(self, table: "defaultdict[str, Counter[str]]", busiest: Busiest, name: str) -> Counter[str]:
        label, left = busiest.label(name)
        if left is not None:
            table.pop(left, None)
        return table[label]

    def text(self, engine: Mapping[str, Any] | None) -> bytes:
        """Return everything in Prometheus' text format. `engine` is what `Backend.stats` gave, None where it is away.

        Raises: MissingExtraError without prometheus-client.
        """
        try:
            from prometheus_client import CollectorRegistry, generate_latest
        except ImportError as error:
            from luthier.core.errors import MissingExtraError

            raise MissingExtraError("prometheus-client", "serve", "GET /metrics") from error
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families([*self._families(), *engine_families(engine)]))
        return generate_latest(registry)

    def _families(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        requests = CounterMetricFamily("luthier_requests", "Requests by route and status class", labels=["route", "status"])
        for (route, status), count in self._requests.items():
            requests.add_metric([route, status], count)
        yield requests
        for kind, table in (("adapter", self._by_adapter), ("tenant", self._by_tenant)):
            asked = CounterMetricFamily(f"luthier_{kind}_requests", f"Answers asked for, by {kind}", labels=[kind])
            tokens = CounterMetricFamily(
                f"luthier_{kind}_tokens",
                f"Tokens by {kind}: of prompts, of those from the prefix cache, of answers",
                labels=[kind, "kind"],
            )
            for name, counts in table.items():
                asked.add_metric([name], counts["requests"])
                for each in ("prompt", "cached", "new"):
                    tokens.add_metric([name, each], counts[each])
            yield asked
            yield tokens
        for name, (histogram, words) in self._seconds.items():
            family = HistogramMetricFamily(f"luthier_{name}_seconds", f"Seconds {words}")
            family.add_metric([], histogram.buckets(), histogram.sum)
            yield family
        if (age := self._view_age()) is not None:
            yield GaugeMetricFamily("luthier_registry_age_seconds", "Since the registry was last read", value=age)


class _Families:
    """What prometheus-client calls a collector."""

    def __init__(self, families: list[Any]):
        self._families = families

    def collect(self) -> list[Any]:
        """Return the families."""
        return self._families


def engine_families(engine: Mapping[str, Any] | None) -> Iterator[Any]:
    """Yield the engine's own figures, from `Backend.stats`; without it only that it is away."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    yield GaugeMetricFamily("luthier_engine_up", "1 while the engine answers", value=float(engine is not None))
    if engine is None:
        return
    if "restarts" in engine:
        yield CounterMetricFamily("luthier_engine_restarts", "Times the engine was started again", value=engine["restarts"])
    if (scheduler := engine.get("scheduler")) is not None:
        stages = GaugeMetricFamily("luthier_engine_requests", "Requests in the engine, by stage", labels=["stage"])
        for stage in ("loading", "waiting", "prefilling", "decoding"):
            stages.add_metric([stage], scheduler[stage] + (engine.get("loading", 0) if stage == "loading" else 0))
        yield stages
        yield GaugeMetricFamily("luthier_kv_tokens", "Tokens set aside for running requests", value=scheduler["kv_tokens"])
        longest = scheduler["longest_wait_seconds"]
        yield GaugeMetricFamily("luthier_longest_wait_seconds", "Of the requests that wait now", value=longest)
    for name in ("kv_bytes", "prefix_bytes", "stacks_bytes"):
        if name in engine:
            yield GaugeMetricFamily(f"luthier_{name}", f"Memory: {name.removesuffix('_bytes')}", value=engine[name])
    if (store := engine.get("adapters")) is not None:
        by_state = Counter(each["state"] for each in store["adapters"])
        states = GaugeMetricFamily("luthier_adapters", "Adapters by where they are", labels=["state"])
        for state in STATES:
            states.add_metric([state], by_state[state])
        yield states
        yield GaugeMetricFamily("luthier_adapter_bytes", "Memory of adapters", value=store["resident_bytes"])
        yield GaugeMetricFamily("luthier_adapter_bytes_limit", "Memory that adapters may have", value=store["limit_bytes"])
        for name, words in (
            ("loads", "Times an adapter was read"),
            ("load_seconds", "Seconds that took"),
            ("evictions", "Times one made way for another"),
            ("failures", "Times one could not be read"),
        ):
            yield CounterMetricFamily(f"luthier_adapter_{name}", words, value=store[name])


def status_class(status: int) -> str:
    """Return the class of an HTTP status; 429 and a client that left are told apart, since they are nobody's fault."""
    return str(status) if status in (429, GONE) else f"{status // 100}xx"


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request, authorization: str | None = Header(None)) -> Response:
    """Tell all figures, to keys with the scope `admin`."""
    from luthier.core.errors import EngineError

    gateway = request.app.state.gateway
    gateway.caller(authorization, Scope.ADMIN)
    try:
        engine = await gateway.backend.stats()
    except EngineError:
        engine = None
    return Response(request.app.state.metrics.text(engine), media_type=CONTENT_TYPE)
