"""`luthier serve` as an operator sees it: what it says, what it refuses, how it stops, and what survives what."""

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.engine_scene import greedy, wait_until, with_adapter
from tests.otlp_collector import attributes, collector
from tests.registry_rows import key_for, tenant_for
from tests.serve_command import Server, luthier_serve
from tests.served_adapters import save_random_adapter
from tests.tiny_run import command, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.adapt import detach
from luthier.cli.serve import without_password
from luthier.registry.place import open_registry
from luthier.registry.registering import register
from luthier.registry.tenancy import Scope
from luthier.registry.tenants import find_tenant, revoke_key
from luthier.registry.usage import tokens_on

STOP = 2
PROMPT = "refret my jazz bass"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A folder with a tiny base in `base`, two adapters in `one` and `two`, and one of another base in `foreign`."""
    folder = tmp_path_factory.mktemp("serve")
    save_tiny_model(folder / "base", tiny_llama, tiny_tokenizer, max_position_embeddings=8192, eos_token_id=STOP)
    save_tiny_model(folder / "other", tiny_llama, tiny_tokenizer, seed=9)
    for seed, (name, base) in enumerate((("one", "base"), ("two", "base"), ("foreign", "other"))):
        model = AutoModelForCausalLM.from_pretrained(folder / base)
        save_random_adapter(folder / name, model, seed)
        detach(model)
    return folder


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Server]:
    with serving(place) as running:
        yield running


def serving(place: Path, *words: object, **environment: str) -> Any:
    adapters = ("-a", f"one={place / 'one'}", "-a", f"two={place / 'two'}")
    return luthier_serve(place / "base", *adapters, "--dtype", "float32", "--threads", 1, *words, folder=place, **environment)


def ask(server: Server, model: str, tokens: int = 8, **headers: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": tokens, "temperature": 0}
    return httpx.post(f"{server.url}/chat/completions", headers=server.headers | headers, json=body, timeout=60)


def wanted(place: Path, adapter: str | None, tokens: int = 8) -> str:
    """What transformers and PEFT answer."""
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False)
    model = with_adapter(AutoModelForCausalLM.from_pretrained(place / "base"), place / adapter if adapter else None)
    return str(tokenizer.decode(greedy(model, prompt, tokens, [STOP])[0], skip_special_tokens=True))


def content(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


class LongAnswer(threading.Thread):
    """A client in the middle of an answer of `tokens` tokens, which ends at no stop token. `text` is all that came."""

    def __init__(self, server: Server, tokens: int):
        super().__init__(daemon=True)
        self.server, self.tokens = server, tokens
        self.begun = threading.Event()
        self.text = ""
        self.start()
        assert self.begun.wait(30)

    def run(self) -> None:
        body = {
            "model": "one",
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": self.tokens,
            "temperature": 0,
            "stream": True,
            "logit_bias": {STOP: -100},
        }
        try:
            url = f"{self.server.url}/chat/completions"
            with httpx.stream("POST", url, headers=self.server.headers, json=body, timeout=60) as response:
                for text in response.iter_text():
                    self.text += text
                    self.begun.set()
        except httpx.HTTPError:
            pass


def test_it_serves_base_and_adapters(server: Server, place: Path) -> None:
    assert server.told["models"] == ["base", "one", "two"]
    listed = httpx.get(f"{server.url}/models", headers=server.headers).json()
    assert [each["id"] for each in listed["data"]] == ["base", "one", "two"]
    answers = {model: content(ask(server, model)) for model in ("base", "one", "two")}
    assert answers == {"base": wanted(place, None), "one": wanted(place, "one"), "two": wanted(place, "two")}
    assert len(set(answers.values())) == 3


def test_the_gateways_process_has_no_torch(server: Server) -> None:
    def libraries(pid: int) -> str:
        return Path(f"/proc/{pid}/maps").read_text()

    assert "libtorch" in libraries(server.engine.pid)
    assert "libtorch" not in libraries(server.process.pid)
    assert psutil.Process(server.process.pid).memory_info().rss < 300 * 2**20


def test_it_tells_what_it_serves(server: Server) -> None:
    engine = server.told["engine"]
    assert engine["kind"] == "process" and engine["threads"] == 1 and engine["form"] == "float"
    assert engine["dtype"].startswith("float32") and engine["max_running"] == 32
    assert server.told["key"].startswith("lk_")
    assert server.told["key"] not in server.log.read_text()


def test_only_its_key_opens_it(server: Server) -> None:
    assert httpx.get(f"{server.url}/models").status_code == 401
    assert httpx.get(f"{server.url}/models", headers={"Authorization": "Bearer lk_guessed"}).status_code == 401
    port = httpx.URL(server.url).port
    listening = [each for each in psutil.Process(server.process.pid).net_connections("inet") if each.status == psutil.CONN_LISTEN]
    assert [(each.laddr.ip, each.laddr.port) for each in listening] == [("127.0.0.1", port)]


def test_a_request_is_a_line_of_the_log(server: Server) -> None:
    id = ask(server, "two", 3).headers["x-request-id"]
    wait_until(lambda: id in server.log.read_text())
    [line] = [json.loads(line) for line in server.log.read_text().splitlines() if id in line]
    assert line["model"] == "two" and line["status"] == 200
    assert PROMPT not in server.log.read_text()


def test_a_killed_engine_is_started_again_behind_the_same_port(server: Server, place: Path) -> None:
    first = server.engine.pid
    answer = LongAnswer(server, 6000)
    os.kill(first, signal.SIGKILL)
    answer.join(30)
    assert not answer.is_alive() and '"error"' in answer.text and "[DONE]" not in answer.text
    statuses = set()

    def is_back() -> bool:
        statuses.add(ask(server, "two").status_code)
        return 200 in statuses

    wait_until(is_back, 60)
    assert statuses <= {200, 503}
    assert server.engine.pid != first
    assert content(ask(server, "one")) == wanted(place, "one")
    page = httpx.get(f"{server.url.removesuffix('/v1')}/metrics", headers=server.headers).text
    assert "luthier_engine_restarts_total 1.0" in page


def test_a_stop_lets_running_answers_finish(place: Path) -> None:
    with serving(place) as server:
        answer = LongAnswer(server, 2500)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: is_refused(server))
        assert answer.is_alive(), "the answer was over before the stop could be seen"
        answer.join(60)
        assert answer.text.rstrip().endswith("[DONE]") and '"finish_reason":"length"' in answer.text.replace(" ", "")
        assert server.process.wait(20) == 0


def test_after_the_time_to_drain_answers_are_cut_off(place: Path) -> None:
    with serving(place, "--drain-seconds", 0.5) as server:
        engine = server.engine.pid
        answer = LongAnswer(server, 8000)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0
        answer.join(10)
        assert "[DONE]" not in answer.text
        assert not psutil.pid_exists(engine)


def test_the_second_signal_waits_for_nobody(place: Path) -> None:
    with serving(place, "--drain-seconds", 600) as server:
        answer = LongAnswer(server, 8000)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: is_refused(server))
        assert answer.is_alive()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        answer.join(10)
        assert "[DONE]" not in answer.text


def test_the_engine_goes_with_a_killed_gateway(place: Path) -> None:
    with serving(place) as server:
        engine = server.engine
        LongAnswer(server, 8000)
        server.process.kill()
        server.process.wait(10)
        wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


def test_the_engine_can_be_in_the_gateways_process_and_traces_be_sent(place: Path) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with collector() as (url, spans):
        with serving(place, "--engine", "inline", "--otlp", url, LUTHIER_API_KEY="a-key-of-the-operators") as server:
            assert server.told["key"] is None and server.told["engine"]["kind"] == "inline"
            server.told["key"] = "a-key-of-the-operators"
            assert content(ask(server, "one", traceparent=f"00-{trace}-{parent}-01")) == wanted(place, "one")
            assert not psutil.Process(server.process.pid).children()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(30) == 0
        told = [span for span in spans if span.trace_id.hex() == trace]
        assert {span.name for span in told} == {"POST /v1/chat/completions", "queue", "generate"}
        [request] = [span for span in told if span.name.startswith("POST")]
        assert request.parent_span_id.hex() == parent and attributes(request)["gen_ai.request.model"] == "one"


def is_refused(server: Server) -> bool:
    url = httpx.URL(server.url)
    with socket.socket() as sock:
        return sock.connect_ex((url.host, url.port)) != 0


# --- refused before it listens -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "environment", "status", "said"),
    [
        (("nowhere",), {}, 1, "Unknown base model 'nowhere'"),
        (("base", "-a", "one=missing"), {}, 2, "no adapter_config.json"),
        (("base", "-a", "a=one", "-a", "a=two"), {}, 2, "two adapters are called 'a'"),
        (("base", "-a", "base=one"), {}, 2, "'base' is the base's name and an adapter's"),
        (("base", "-a", "a/b=one"), {}, 2, "adapter name 'a/b' is not usable"),
        (("base", "--engine", "steam"), {}, 2, "write process or inline or vllm"),
        (("base", "--host", "no.such.host.invalid"), {}, 2, "is no address of this machine"),
        (("base",), {"LUTHIER_API_KEY": "short"}, 2, "needed are at least 16"),
    ],
)
def test_what_cannot_be_is_refused_at_once(luthier, monkeypatch, place, words, environment, status, said) -> None:
    monkeypatch.chdir(place)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = luthier("serve", *words, "--port", 0)
    assert found.status == status
    assert said in " ".join(found.err.split())
    assert not any(value in found.err for value in environment.values())


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(luthier, monkeypatch, place: Path) -> None:
    monkeypatch.chdir(place)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        found = luthier("serve", "base", "--port", port)
    assert found.status == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in " ".join(found.err.split())
    assert "Loading" not in found.out + found.err


def test_an_adapter_of_another_base_is_told_before_it_listens(place: Path) -> None:
    import subprocess

    words = command("serve", place / "base", "-a", f"x={place / 'foreign'}", "--port", 0, "--dtype", "float32", "--threads", 1)
    found = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 1
    assert "BaseMismatchError" in found.stderr and "Serving on" not in found.stdout


# --- over a registry ---------------------------------------------------------------------------------------------


def test_a_registrys_tenants_are_served_with_what_they_may(place: Path) -> None:
    registry = open_registry(place / "registry", create=True)
    for name in ("one", "two"):
        register(registry, place / name, name=name, actor="ann", owner="team", tenant=name, no_data_reason="a test")
    tenant_for(registry, "one", ("base", ""))
    tenant_for(registry, "two")
    keys = {name: key_for(registry, name) for name in ("one", "two")} | {"admin": key_for(registry, "two", "boss", Scope.ADMIN)}
    with luthier_serve(
        place / "base", "--registry", place / "registry", "--dtype", "float32", "--threads", 1, folder=place
    ) as server:
        assert server.told["key"] is None and server.told["registry"] == str(place / "registry")

        def as_tenant(name: str, model: str) -> httpx.Response:
            server.told["key"] = keys[name]
            return ask(server, model)

        assert content(as_tenant("one", "one:1")) == wanted(place, "one")
        assert content(as_tenant("two", "two:1")) == wanted(place, "two")
        assert content(as_tenant("one", "base")) == wanted(place, None)
        for tenant, model in (("one", "two:1"), ("two", "one:1"), ("two", "base"), ("one", str(place / "two"))):
            assert as_tenant(tenant, model).status_code == 404
        page = httpx.get(f"{server.url.removesuffix('/v1')}/metrics", headers={"Authorization": f"Bearer {keys['admin']}"}).text
        assert 'luthier_tenant_requests_total{tenant="one"}' in page and "luthier_registry_age_seconds" in page
        with registry.database.writing() as session:
            revoke_key(session, find_tenant(session, "one"), "ci", actor="ada")
        wait_until(lambda: as_tenant("one", "one:1").status_code == 401)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0, server.log.read_text()
    with registry.database.reading() as session:
        used = tokens_on(session, datetime.now(UTC).date())
    assert set(used.values()) and all(used.values())
    assert not any(key in server.log.read_text() for key in keys.values())
    registry.database.engine.dispose()


def test_folders_and_a_registry_are_not_served_together(luthier, monkeypatch, place: Path) -> None:
    monkeypatch.chdir(place)
    found = luthier("serve", "base", "--registry", "registry", "-a", "one", "--port", 0)
    assert found.status == 2 and "belong to no tenant" in found.err


def test_a_registry_that_is_not_there_is_told(luthier, monkeypatch, place: Path) -> None:
    monkeypatch.chdir(place)
    found = luthier("serve", "base", "--registry", "nowhere", "--port", 0)
    assert found.status == 1 and "nowhere" in found.err


@pytest.mark.parametrize(
    ("place", "shown", "password"),
    [
        ("postgresql://me:s3cret@db/x?blobs=b", "postgresql://me:***@db/x?blobs=b", "s3cret"),
        ("sqlite:////srv/registry.sqlite3", "sqlite:////srv/registry.sqlite3", None),
        ("/srv/registry", "/srv/registry", None),
        (None, None, None),
    ],
)
def test_a_password_is_not_shown(place: str | None, shown: str | None, password: str | None) -> None:
    assert without_password(place) == (shown, password)
