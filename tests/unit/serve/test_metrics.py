"""GET /metrics: what it counts, who may read it, and that no traffic can make it grow without end."""

import random

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from luthier.engine.jobs import Event
from luthier.engine.requests import Completion
from luthier.registry.tenancy import Scope
from luthier.registry.view import Caller
from luthier.serve.metrics import Busiest, Histogram, Metrics
from luthier.serve.observing import Observed


def samples_of(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Read a page as Prometheus' own parser does."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    return samples_of(text)[name, frozenset(labels.items())]


def request(tenant: str, adapter: str | None, *, status: int = 200, new: int = 3) -> Observed:
    """The notes of a request that was answered with `new` tokens."""
    caller = Caller(1, tenant, 1, "laptop", frozenset({Scope.INFERENCE}))
    notes = Observed(method="POST", route="/v1/chat/completions", caller=caller, status=status, seconds=1.0)
    answer = notes.answer(adapter or "base", adapter, (1, 2, 3, 4, 5))
    for _ in range(new):
        answer.saw(Event("x", (7,)))
    answer.saw(Event("", (), (), Completion("xxx", (7,) * new, "stop", 5, 2, queue_seconds=0.3)))
    return notes


def test_tokens_are_counted_by_adapter_and_tenant() -> None:
    metrics = Metrics()
    for notes in (
        request("acme", "a:1"),
        request("acme", "a:1", new=10),
        request("zeta", None),
        request("zeta", "b:2", status=499),
    ):
        metrics.observe(notes)
    text = metrics.text(None).decode()
    assert value(text, "luthier_adapter_tokens_total", adapter="a:1", kind="new") == 13
    assert value(text, "luthier_adapter_tokens_total", adapter="a:1", kind="prompt") == 10
    assert value(text, "luthier_adapter_tokens_total", adapter="a:1", kind="cached") == 4
    assert value(text, "luthier_adapter_requests_total", adapter="base") == 1
    assert value(text, "luthier_tenant_tokens_total", tenant="zeta", kind="new") == 6
    assert value(text, "luthier_requests_total", route="/v1/chat/completions", status="2xx") == 3
    assert value(text, "luthier_requests_total", route="/v1/chat/completions", status="499") == 1
    assert value(text, "luthier_queue_seconds_bucket", le="0.2") == 0
    assert value(text, "luthier_queue_seconds_bucket", le="0.5") == 4
    assert value(text, "luthier_queue_seconds_sum") == pytest.approx(1.2)
    assert value(text, "luthier_engine_up") == 0


def test_a_thousand_names_do_not_grow_the_page() -> None:
    metrics = Metrics(labelled=8)
    dice = random.Random(0)
    for number in range(20):
        metrics.observe(request(f"t{number}", f"a:{number}"))
    before = len(samples_of(metrics.text(None).decode()))
    for _ in range(5_000):
        number = dice.randrange(1_000)
        metrics.observe(request(f"t{number}", f"a:{number}"))
    text = metrics.text(None).decode()
    assert len(samples_of(text)) == before
    adapters = {dict(labels)["adapter"] for name, labels in samples_of(text) if name == "luthier_adapter_requests_total"}
    assert len(adapters) == 9 and "other" in adapters
    assert len(metrics._adapters._others) <= 32


def test_the_busiest_have_labels_of_their_own() -> None:
    busiest = Busiest(limit=3)
    dice = random.Random(1)
    names = ["big", "large", "great"]
    for _ in range(6_000):
        busiest.label(dice.choice(names) if dice.random() < 0.5 else f"small{dice.randrange(500)}")
    assert set(busiest._shown) == set(names)


def test_names_of_like_traffic_do_not_change_places_for_ever() -> None:
    busiest = Busiest(limit=4)
    changes = sum(busiest.label(f"a{turn % 8}")[1] is not None for turn in range(8_000))
    assert changes == 0


def test_who_was_busy_once_makes_room() -> None:
    busiest = Busiest(limit=1)
    for _ in range(9_000):
        busiest.label("old")
    left = [busiest.label("new")[1] for _ in range(12_000)]
    assert left.count("old") == 1
    assert busiest.label("old") == ("other", None)


@pytest.mark.parametrize(("value", "place"), [(0.0, 0), (1.0, 0), (1.0001, 1), (2.0, 1), (5.0, 2)])
def test_a_bucket_holds_what_is_at_most_its_bound(value: float, place: int) -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.add(value)
    assert histogram.counts[place] == 1 and sum(histogram.counts) == 1


def test_the_page_needs_a_key_with_the_scope_admin(served) -> None:
    assert httpx.get(f"{served.url}/metrics").status_code == 401
    assert httpx.get(f"{served.url}/metrics", headers={"Authorization": "Bearer lk_wrong"}).status_code == 401
    page = httpx.get(f"{served.url}/metrics", headers=served.headers)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_the_page_tells_of_real_requests(served, client) -> None:
    def page() -> str:
        return httpx.get(f"{served.url}/metrics", headers=served.headers).text

    before = samples_of(page())
    answer = client.chat.completions.create(model="alpha", messages=[{"role": "user", "content": "hi"}], max_tokens=5)
    httpx.get(f"{served.url}/v1/models/{'x' * 50}", headers=served.headers)
    httpx.get(f"{served.url}/no/such/{'y' * 50}")
    after = page()
    key = ("luthier_adapter_tokens_total", frozenset({("adapter", "alpha"), ("kind", "new")}))
    assert samples_of(after)[key] - before.get(key, 0) == answer.usage.completion_tokens
    assert value(after, "luthier_engine_up") == 1
    assert value(after, "luthier_adapters", state="resident") >= 1
    assert value(after, "luthier_requests_total", route="/v1/models/{name:path}", status="4xx") == 1
    assert "xxx" not in after and "yyy" not in after
    assert value(after, "luthier_adapter_bytes") > 0
