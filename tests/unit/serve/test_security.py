"""Who may not is refused, by HTTP against a real server in a process of its own, and no file is opened that is not served.

The server writes down what it opens (sys.addaudithook) and logs all that there is to log; what it must not open, and must not
log, is looked for at the end.
"""

import json
import os
import pickle
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from tests.registry_rows import key_for, tenant_for
from tests.served_adapters import TENSORS, cut_short, flip_bit, put_nan, save_random_adapter

from luthier.registry.columns import now
from luthier.registry.place import Registry, open_registry
from luthier.registry.registering import register
from luthier.registry.schema import AdapterFile
from luthier.registry.tenancy import SHOWN, Scope
from luthier.registry.tenants import deactivate, find_tenant, revoke_key
from luthier.registry.versions import find_version

ROOT = Path(__file__).resolve().parents[3]
LOCAL_KEY = "lk_local_key_that_only_this_test_knows_0000000"


@dataclass
class Attacked:
    """A running server with its registry, and what it wrote down."""

    url: str
    local_url: str
    registry: Registry
    home: Path
    keys: dict[str, str]
    digests: dict[str, str]

    def ask(self, model: Any, key: str | None = "acme", url: str | None = None) -> httpx.Response:
        """Ask for an answer of one token."""
        body = {"model": model, "messages": [{"role": "user", "content": "hm"}], "max_tokens": 1}
        return httpx.post(f"{url or self.url}/v1/chat/completions", json=body, headers=self.headers(key), timeout=60)

    def send(self, content: Any, key: str | None = "acme", kind: str = "application/json") -> httpx.Response:
        """Send bytes, or pieces of them, as the body of a request for an answer."""
        headers = self.headers(key) | {"Content-Type": kind}
        return httpx.post(f"{self.url}/v1/chat/completions", content=content, headers=headers, timeout=60)

    def headers(self, key: str | None) -> dict[str, str]:
        """Return the header that brings a key by its name here, or as it is."""
        return {} if key is None else {"Authorization": f"Bearer {self.keys.get(key, key)}"}

    def opened(self) -> set[Path]:
        """Return the files that the server has opened since it was ready."""
        return {Path(line) for line in (self.home / "opened").read_text().splitlines()}

    def log(self) -> str:
        """Return all that was logged."""
        return (self.home / "log").read_text(errors="replace")


class Touches:
    """A pickle that makes a file when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.marker),))


def poisoned(folder: Path, base_of: Callable[[int], Any]) -> dict[str, Path]:
    """Make adapters that must not be used, and one that may. `base_of` gives a new base for a seed; 0 is what is served."""
    made = {name: save_random_adapter(folder / name, base_of(0), seed)
            for seed, name in enumerate(("sound", "cut", "nan", "bomb", "pickled", "names", "twisted"))}  # fmt: skip
    made["foreign"] = save_random_adapter(folder / "foreign", base_of(99), 9)
    cut_short(made["cut"])
    put_nan(made["nan"])
    raw = (made["bomb"] / TENSORS).read_bytes()
    (made["bomb"] / TENSORS).write_bytes(struct.pack("<Q", 2**62) + raw[8:])
    (made["pickled"] / TENSORS).unlink()
    (made["pickled"] / "luthier.json").unlink(missing_ok=True)
    (made["pickled"] / "adapter_model.bin").write_bytes(pickle.dumps(Touches(folder / "the-pickle-was-read")))
    header = json.dumps({"../../../etc/passwd": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (made["names"] / TENSORS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
    (made["names"] / "luthier.json").unlink(missing_ok=True)
    config = json.loads((made["twisted"] / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "canary")
    (made["twisted"] / "adapter_config.json").write_text("[" * 100_000 + json.dumps(config))
    (made["twisted"] / "luthier.json").unlink(missing_ok=True)
    return made


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, tiny_tokenizer: Any) -> Iterator[Attacked]:
    home, vocab = tmp_path_factory.mktemp("attacked"), len(tiny_tokenizer)
    base = home / "base"

    def base_of(seed: int) -> Any:
        model = tiny_llama(vocab=vocab, seed=seed)
        model.config.architectures = [type(model).__name__]  # as it is when it comes from a folder
        return model

    base_of(0).save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    registry = open_registry(home / "registry", create=True)
    sources = {}
    for seed, (name, tenant) in enumerate((("orders", "acme"), ("secrets", "rival"), ("spoilt", "acme"))):
        sources[name] = save_random_adapter(home / "trained" / name, base_of(0), seed)
        register(registry, sources[name], name=name, actor="ann", owner="team", tenant=tenant, no_data_reason="a test")
    tenant_for(registry, "acme", ("base", ""))
    tenant_for(registry, "rival")
    tenant_for(registry, "idle", ("base", ""))
    keys = {
        "acme": key_for(registry, "acme", "ci"),
        "rival": key_for(registry, "rival", "ci"),
        "revoked": key_for(registry, "acme", "old"),
        "to-revoke": key_for(registry, "acme", "soon"),
        "expired": key_for(registry, "acme", "short", expires_at=now() + timedelta(seconds=1)),
        "idle": key_for(registry, "idle", "ci"),
        "admin": key_for(registry, "acme", "admin", Scope.ADMIN),
        "local": LOCAL_KEY,
    }
    with registry.database.writing() as session:
        revoke_key(session, find_tenant(session, "acme"), "old", actor="ada")
        deactivate(session, find_tenant(session, "idle"), actor="ada")
    with registry.database.reading() as session:
        digests = {name: find_version(session, f"{name}:1").manifest_digest for name in ("orders", "secrets")}
        spoilt = session.get_one(AdapterFile, (find_version(session, "spoilt:1").id, TENSORS)).blob_digest
    [blob] = [file for file in (home / "registry").rglob("*") if file.is_file() and file.name.endswith(spoilt[4:])]
    flip_bit(blob)
    folders = poisoned(home / "given", base_of)
    config = {
        "registry": str(home / "registry"),
        "base": str(base),
        "state": str(home / "state"),
        "folders": {name: str(folder) for name, folder in folders.items()},
        "key": LOCAL_KEY,
        "opened": str(home / "opened"),
        "log": str(home / "log"),
    }
    (home / "config.json").write_text(json.dumps(config))
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with (
        (home / "stderr").open("wb") as errors,
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/audited_server.py"), str(home / "config.json")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment,
        ) as running,
    ):  # fmt: skip
        assert running.stdin is not None and running.stdout is not None
        line = running.stdout.readline()
        assert line, (home / "stderr").read_text()
        ports = json.loads(line)
        yield Attacked(f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", registry, home, keys, digests)
        running.stdin.close()
        assert running.wait(60) == 0, (home / "stderr").read_text()
    registry.database.engine.dispose()


def is_refusal(response: httpx.Response, status: int) -> bool:
    """Whether it is one in OpenAI's form."""
    body = response.json()
    return response.status_code == status and set(body) == {"error"} and {"message", "type", "code"} <= set(body["error"])


# --- keys ----------------------------------------------------------------------------------------------------------


def test_a_key_that_works_gets_an_answer(server: Attacked) -> None:
    assert server.ask("orders:1").status_code == 200
    assert server.ask("tiny").status_code == 200
    assert server.ask("secrets:1", "rival").status_code == 200


@pytest.mark.parametrize("key", [None, "wrong", "lk_" + "x" * 43, "revoked", "expired", "idle", "local"])
def test_whoever_has_no_key_that_works_is_told_the_same(server: Attacked, key: str | None) -> None:
    response, reference = server.ask("orders:1", key), server.ask("orders:1", "lk_never")
    assert is_refusal(response, 401) and response.headers["WWW-Authenticate"] == "Bearer"
    assert response.json() == reference.json()


@pytest.mark.parametrize("header", ["Basic KEY", "KEY", "Bearer", "Bearer KEY KEY", "bearer\tKEY", "Token KEY"])
def test_a_key_in_another_form_is_none(server: Attacked, header: str) -> None:
    sent = {"Authorization": header.replace("KEY", server.keys["acme"])}
    assert httpx.get(f"{server.url}/v1/models", headers=sent).status_code == 401


def test_bytes_that_are_no_text_are_no_key(server: Attacked) -> None:
    sent = [(b"authorization", b"Bearer \xff\xfe\x80")]
    assert httpx.get(f"{server.url}/v1/models", headers=sent).status_code == 401


def test_a_key_that_is_revoked_stops_working(server: Attacked) -> None:
    assert server.ask("tiny", "to-revoke").status_code == 200
    with server.registry.database.writing() as session:
        revoke_key(session, find_tenant(session, "acme"), "soon", actor="ada")
    until = time.monotonic() + 20
    while (response := server.ask("tiny", "to-revoke")).status_code == 200:
        assert time.monotonic() < until, "it still works"
    assert response.status_code == 401


def test_a_key_for_inference_runs_no_server_and_one_for_running_it_answers_nothing(server: Attacked) -> None:
    for path in ("/admin/adapters", "/admin/usage"):
        assert is_refusal(httpx.get(server.url + path, headers=server.headers("acme")), 403)
    assert is_refusal(server.ask("tiny", "admin"), 403)


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/redoc", "/metrics", "/", "/v1", "/admin", "/debug"])
def test_what_is_not_offered_is_not_there(server: Attacked, path: str) -> None:
    assert httpx.get(server.url + path).status_code in (401, 404)


# --- names ---------------------------------------------------------------------------------------------------------

TWINS = {
    "cyrillic": "\u043erders:1",
    "full width": "\uff4f\uff52\uff44\uff45\uff52\uff53\uff1a\uff11",
    "zero width": "orders\u200b:1",
    "joiner": "orders:1\u200d",
    "bidi": "\u202eorders:1",
    "combining": "o\u0301rders:1",
    "ligature": "o\ufb00rders:1",
    "arabic digit": "orders:\u0661",
    "upper case": "ORDERS:1",
    "title": "Orders:1",
    "leading blank": " orders:1",
    "trailing blank": "orders:1 ",
    "nul": "orders:1\0",
    "nul inside": "orders:1\0secrets:1",
    "line": "orders:1\n",
    "leading zero": "orders:01",
    "plus": "orders:+1",
    "float": "orders:1.0",
    "no such version": "orders:2",
    "twice": "orders:1:1",
    "twice the name": "orders:orders:1",
}
OTHERS = {
    "name": "secrets",
    "version": "secrets:1",
    "alias": "secrets:stable",
    "tenant's": "rival/secrets:1",
    "parent": "../secrets",
    "through one's own": "orders:1/../secrets:1",
    "encoded": "..%2fsecrets:1",
    "encoded twice": "..%252fsecrets:1",
    "back slash": "..\\secrets:1",
    "dots": "....//secrets:1",
    "absolute": "/etc/passwd",
    "url": "file:///etc/passwd",
    "hub": "someone/some-adapter",
    "home": "~/secrets",
    "variable": "$HOME",
    "quotes": "' OR 1=1 --",
    "format": "{secrets}%s%n",
    "long": "a" * 500,
}


@pytest.mark.parametrize("name", [*TWINS.values(), *OTHERS.values()], ids=[*TWINS, *OTHERS])
def test_a_name_that_is_not_ones_own_is_no_name(server: Attacked, name: str) -> None:
    response = server.ask(name)
    assert is_refusal(response, 404), response.text
    assert response.json()["error"]["code"] == "model_not_found"
    reference = server.ask("nothing-of-that-name")
    shown = name if len(name) <= 100 else f"{name[:100]}..."
    message = reference.json()["error"]["message"].replace("'nothing-of-that-name'", repr(shown))
    assert response.json()["error"] == reference.json()["error"] | {"message": message}
    looked_up = httpx.get(f"{server.url}/v1/models/{quote(name[:2000], safe='')}", headers=server.headers("acme"))
    assert is_refusal(looked_up, 404), looked_up.text


def test_neither_digests_nor_places_are_names(server: Attacked) -> None:
    places = [server.home / "trained" / "secrets", server.home / "trained" / "orders", server.home / "registry"]
    cached = list((server.home / "registry" / "cache").glob("*/*"))
    for name in [server.digests["secrets"], server.digests["orders"], server.digests["orders"][:16], *map(str, places + cached)]:
        assert is_refusal(server.ask(name), 404), name


@pytest.mark.parametrize("model", [None, 1, True, ["orders:1"], {"name": "orders:1"}, "", "a" * 20_000])
def test_what_is_no_text_is_no_name(server: Attacked, model: Any) -> None:
    assert server.ask(model).status_code in (400, 404)


def test_the_list_shows_ones_own_and_nothing_else(server: Attacked) -> None:
    def listed(key: str) -> set[str]:
        answer = httpx.get(f"{server.url}/v1/models", headers=server.headers(key))
        return {one["id"] for one in answer.json()["data"]}

    assert listed("acme") == {"tiny", "orders", "orders:1", "spoilt", "spoilt:1"}
    assert listed("rival") == {"secrets", "secrets:1"}


def test_a_key_that_stands_twice_is_read_one_way(server: Attacked) -> None:
    """Whichever of two equal keys counts, it is the one that is checked."""
    for first, second in (("orders:1", "secrets:1"), ("secrets:1", "orders:1")):
        body = f'{{"model": "{first}", "model": "{second}", "messages": [{{"role": "user", "content": "hm"}}], "max_tokens": 1}}'
        answer = server.send(body)
        assert answer.status_code in (400, 404) or answer.json()["model"] == second == "orders:1"


# --- bodies --------------------------------------------------------------------------------------------------------

GOOD = '"messages": [{"role": "user", "content": "hm"}]'
BODIES = {
    "nothing": b"",
    "no json": b"model=orders:1",
    "half": b'{"model": "orders:1"',
    "deep list": b"[" * 60_000,
    "deep message": b'{"model": "orders:1", "messages": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "deep schema": b'{"model": "orders:1", ' + GOOD.encode() + b', "response_format": {"type": "json_schema", "json_schema": '
    b'{"name": "a", "schema": ' + b'{"properties": {"a": ' * 2_000 + b"{}" + b"}}" * 2_000 + b"}}}",
    "infinity": b'{"model": "orders:1", "temperature": 1e999, ' + GOOD.encode() + b"}",
    "nan": b'{"model": "orders:1", "temperature": NaN, ' + GOOD.encode() + b"}",
    "long number": b'{"model": "orders:1", "max_tokens": ' + b"9" * 5_000 + b", " + GOOD.encode() + b"}",
    "negative": b'{"model": "orders:1", "max_tokens": -1, ' + GOOD.encode() + b"}",
    "huge seed": b'{"model": "orders:1", "seed": 99999999999999999999999, "temperature": 1, ' + GOOD.encode() + b"}",
    "many answers": b'{"model": "orders:1", "n": 1000000000, ' + GOOD.encode() + b"}",
    "many logprobs": b'{"model": "orders:1", "logprobs": true, "top_logprobs": 1000000, ' + GOOD.encode() + b"}",
    "half a character": b'{"model": "\\ud800", ' + GOOD.encode() + b"}",
    "no utf-8": b'{"model": "\xff\xfe", ' + GOOD.encode() + b"}",
    "utf-16": '{"model": "orders:1"}'.encode("utf-16"),
    "list": b"[1, 2, 3]",
    "word": b'"orders:1"',
    "null": b"null",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_is_none_is_refused_and_nothing_breaks(server: Attacked, body: bytes) -> None:
    response = server.send(body)
    assert is_refusal(response, 400) or is_refusal(response, 404)
    assert server.ask("orders:1").status_code == 200


def test_a_body_that_is_too_large_is_refused_whether_its_length_is_told_or_not(server: Attacked) -> None:
    large = json.dumps({"model": "orders:1", "messages": [{"role": "user", "content": "x" * 70_000}]}).encode()
    assert is_refusal(server.send(large), 413)

    def pieces() -> Iterator[bytes]:
        yield from (large[start : start + 4096] for start in range(0, len(large), 4096))

    assert is_refusal(server.send(pieces()), 413)


def test_a_body_is_not_read_for_who_has_no_key(server: Attacked) -> None:
    assert server.send(b"[" * 60_000, key=None).status_code == 401


KINDS = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/xml"]


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_body_is_refused(server: Attacked, kind: str) -> None:
    body = json.dumps({"model": "orders:1", "messages": [{"role": "user", "content": "hm"}]}).encode()
    response = server.send(body, kind=kind)
    assert is_refusal(response, 400) or is_refusal(response, 415)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cut", "nan", "bomb", "pickled", "names", "twisted", "foreign"])
def test_a_poisoned_adapter_is_refused_and_says_nothing_of_its_place(server: Attacked, name: str) -> None:
    assert server.ask("sound", "local", server.local_url).status_code == 200
    response = server.ask(name, "local", server.local_url)
    assert is_refusal(response, 409) and response.json()["error"]["code"] == "adapter_unusable"
    assert str(server.home) not in response.text and "/" not in response.json()["error"]["message"]
    assert server.ask("sound", "local", server.local_url).status_code == 200
    assert not (server.home / "given" / "the-pickle-was-read").exists()


def test_bytes_of_the_registry_that_were_changed_are_refused(server: Attacked) -> None:
    response = server.ask("spoilt:1")
    assert is_refusal(response, 409) and str(server.home) not in response.text


def test_nothing_was_opened_that_is_not_served(server: Attacked) -> None:
    """After all of the above, also where a single test was asked for: the worst of it is done again here."""
    before = server.opened()
    for name in [*OTHERS.values(), *TWINS.values(), str(server.home / "trained" / "secrets"), server.digests["secrets"]]:
        server.ask(name)
    assert not {path for path in server.opened() - before if not _is_program(path)}

    server.ask("orders:1"), server.ask("cut", "local", server.local_url)
    opened = {path for path in server.opened() if not _is_program(path)}
    served = [server.home / "registry", server.home / "given", server.home / "state", server.home / "base"]
    assert not [path for path in opened if not any(path.is_relative_to(folder) for folder in served)]
    assert [path for path in opened if path.is_relative_to(server.home / "given" / "cut")], "nothing is written down at all"
    assert not [path for path in opened if "canary" in str(path) or "passwd" in str(path)]


def _is_program(path: Path) -> bool:
    """Python's own files and the kernel's: imports that come late, and clocks."""
    places = (sys.prefix, sys.base_prefix, "/usr", "/proc", "/sys", "/dev", "/etc/localtime", ROOT / "src", ROOT / "tests")
    return any(path.is_relative_to(place) for place in places) or path.suffix in (".py", ".pyc", ".so")


def test_no_key_is_in_any_log(server: Attacked) -> None:
    """Whole or in part, but for the beginning that tells keys apart; the log is at its most talkative."""
    server.ask("orders:1"), server.ask("secrets:1"), server.ask("orders:1", "wrong-but-secret-all-the-same")
    httpx.get(f"{server.url}/v1/models?api_key={server.keys['acme']}", headers=server.headers("acme"))
    log = server.log() + (server.home / "stderr").read_text(errors="replace")
    assert "DEBUG" in log and len(log) > 1000, "nothing is logged at all"
    for secret in [*server.keys.values(), "wrong-but-secret-all-the-same"]:
        assert secret[SHOWN:] not in log
    written = [file for folder in ("state", "registry") for file in (server.home / folder).rglob("*") if file.is_file()]
    for file in written:
        assert not any(secret[SHOWN:].encode() in file.read_bytes() for secret in server.keys.values()), file
