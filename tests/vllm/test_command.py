"""`luthier serve --engine vllm` as an operator starts it and clients ask it: a registry's tenants, a real vLLM, kill -9."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from tests.registry_rows import key_for, tenant_for
from tests.serve_command import Server, luthier_serve
from tests.vllm.conftest import PROMPTS, TOKENS
from tests.vllm.listening import addresses, is_open, ports, speaks_http, tree

from luthier.registry.tenancy import Scope


@pytest.fixture(scope="module")
def keys(scene) -> dict[str, str]:
    """Return a key of the tenant that has the adapters, of one that has nothing, and an administrator's."""
    for name in ("acme", "other"):
        tenant_for(scene.registry, name, ("base", ""))
    keys = {name: key_for(scene.registry, name) for name in ("acme", "other")}
    return keys | {"admin": key_for(scene.registry, "acme", "boss", Scope.ADMIN)}


@pytest.fixture(scope="module")
def server(scene, vllm_python, keys) -> Iterator[Server]:
    """Return a running server. Its vLLM is in the machine's own network, where the kernel does not help to close it."""
    words = ["base", "--engine", "vllm", "--registry", "registry", "--vllm-python", vllm_python, "--dtype", "float32"]
    words += ["--max-active-adapters", 3, "--vllm", "kv_gib=1", "--vllm", "network=host", "--vllm", "stop_seconds=5"]
    with luthier_serve(*words, folder=scene.place) as running:
        yield running


def ask(server: Server, key: str, model: str, prompt: str = PROMPTS[0], **more) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0} | more
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/completions", json=body, headers=headers, timeout=300)


def keeper_of(server: Server) -> int:
    """The process that vLLM's all came of."""
    (keeper,) = psutil.Process(server.process.pid).children()
    return keeper.pid


def test_it_says_what_it_serves_with(server):
    told = server.told["engine"]
    assert (told["kind"], told["vllm"], told["device"], told["network"]) == ("vllm", "0.32.0", "cpu", "host")
    assert told["max_request_tokens"] == 256 and server.told["key"] is None


def test_a_tenant_is_answered_as_by_luthiers_own_engine(scene, server, keys):
    asked = [(name, text) for text in PROMPTS for name in (None, *scene.adapters)]
    with ThreadPoolExecutor(len(asked)) as clients:
        answers = list(clients.map(lambda each: ask(server, keys["acme"], each[0] or "base", each[1]), asked))
    for (name, text), answer in zip(asked, answers, strict=True):
        wanted = scene.texts[name, tuple(scene.tokenizer(text)["input_ids"])]
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == wanted.text
        assert answer.json()["usage"]["completion_tokens"] >= len(wanted.token_ids)


def test_others_have_none_of_its_names(scene, server, keys):
    assert ask(server, keys["other"], scene.adapters[0]).status_code == 404
    assert ask(server, "lk_wrong", "base").status_code == 401
    assert ask(server, keys["other"], "base").status_code == 200


def test_a_refused_adapter_is_told_with_the_reason(scene, server, keys):
    refused = ask(server, keys["acme"], "acme/dora:1")
    assert refused.status_code == 409 and scene.unfit["acme/dora:1"] in refused.json()["error"]["message"]


def test_figures_are_told_as_of_any_engine(server, keys):
    page = httpx.get(server.url.removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {keys['admin']}"}).text
    assert "luthier_engine_up 1.0" in page and 'luthier_adapters{state="resident"}' in page


def test_no_port_of_vllms_answers(server):
    """Whatever its processes listen on is for each other: nothing speaks HTTP, and nothing is open to other machines."""
    keeper = keeper_of(server)
    assert len(tree(keeper)) >= 3
    outside = [address for address in addresses() if not address.startswith("127.")]
    found = ports(keeper)
    assert found and all(address in ("127.0.0.1", "::1") for address, _ in found)
    assert not any(speaks_http(address, port) for _, port in found for address in addresses())
    assert not any(is_open(address, port) for _, port in found for address in outside)


def test_after_kill_9_of_vllm_under_load_it_says_503_and_answers_again(scene, server, keys):
    statuses: list[int] = []
    over = threading.Event()

    def client(name: str | None) -> None:
        while not over.is_set():
            statuses.append(ask(server, keys["acme"], name or "base").status_code)
            time.sleep(0.2)

    ready = server.url.removesuffix("/v1") + "/health/ready"
    clients = [threading.Thread(target=client, args=[name]) for name in (None, *scene.adapters[:3])]
    for each in clients:
        each.start()
    try:
        _, vllm, *_ = tree(keeper_of(server))
        vllm.kill()
        assert wait(lambda: httpx.get(ready).status_code == 503)
        assert wait(lambda: httpx.get(ready).status_code == 200)
        came_back = len(statuses)
        assert wait(lambda: len(statuses) > came_back + 8)
    finally:
        over.set()
        for each in clients:
            each.join()
    assert 503 in statuses and set(statuses) <= {200, 503}
    assert set(statuses[-4:]) == {200}
    name, text = scene.adapters[0], PROMPTS[1]
    wanted = scene.texts[name, tuple(scene.tokenizer(text)["input_ids"])]
    assert ask(server, keys["acme"], name, text).json()["choices"][0]["text"] == wanted.text


def test_kill_9_of_the_gateway_takes_vllm_with_it(server):
    """The last test here: nobody is left afterwards."""
    processes = tree(keeper_of(server))
    server.process.kill()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []


def wait(condition, seconds: float = 300) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False
