"""vLLM is reachable by nobody but its gateway: no port, no route without the key, no folder to enter."""

import stat

import httpx
import pytest
from tests.vllm.listening import addresses, is_open, ports, speaks_http, tree

OPEN_IN_VLLM = [
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/ping"),
    ("POST", "/ping"),
    ("GET", "/version"),
    ("GET", "/load"),
    ("POST", "/invocations"),
    ("POST", "/adapters"),
    ("DELETE", "/adapters/acme%2Ftrained:1"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("POST", "/pause"),
    ("POST", "/scale_elastic_ep"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/luthier"),
    ("OPTIONS", "/v1/completions"),
]


@pytest.mark.parametrize(("method", "path"), OPEN_IN_VLLM)
def test_no_route_answers_without_the_key(method, path, vllm):
    """Even for one who has the socket, which takes the same user or root."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(vllm.backend.supervisor.place.socket))) as client:
        for headers in ({}, {"Authorization": "Bearer no"}):
            assert client.request(method, f"http://vllm{path}", headers=headers, content=b"{}").status_code == 401


def test_the_tree_has_no_port_that_answers(vllm):
    keeper = vllm.backend.supervisor.pid
    assert len(tree(keeper)) >= 3  # the keeper, vLLM's server and its engine: otherwise this looked at nothing
    found = ports(keeper)
    assert found and all(address in ("127.0.0.1", "::1") for address, _ in found)  # Gloo's, for its own processes
    assert not any(speaks_http(address, port) for _, port in found for address in addresses())
    if vllm.backend.supervisor.network == "none":
        assert not any(is_open(address, port) for _, port in found for address in addresses())


def test_its_folder_is_for_its_user_alone(vllm):
    place = vllm.backend.supervisor.place
    assert stat.S_IMODE(place.folder.stat().st_mode) == 0o700
    assert stat.S_ISSOCK(place.socket.stat().st_mode)


def test_the_key_stands_on_no_command_line(vllm):
    key = vllm.backend.supervisor.key
    assert not any(key in " ".join(process.cmdline()) for process in tree(vllm.backend.supervisor.pid))
