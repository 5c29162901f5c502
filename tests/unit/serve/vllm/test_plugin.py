"""The resolver: what it looks up, what it refuses, and what it never touches. The registry and the adapters are real."""

import asyncio

import pytest
from tests.served_adapters import flip_bit, save_random_adapter
from tests.unfit_adapters import MAX_RANK

from luthier.adapt import detach
from luthier.core.errors import BaseMismatchError, RefusedError, RegistryError, UnservableError
from luthier.registry.place import open_registry
from luthier.registry.registering import register
from luthier.registry.schema import AdapterVersion
from luthier.serve.vllm.plugin import RegistryResolver, id_of, is_reference

SAID = {"actor": "ann", "owner": "team", "no_data_reason": "random numbers"}


@pytest.fixture
def registry(tmp_path):
    opened = open_registry(tmp_path / "registry", create=True)
    yield opened
    opened.database.engine.dispose()


@pytest.fixture
def resolver(registry, tmp_path, served):
    made = RegistryResolver(str(tmp_path / "registry"), served, MAX_RANK)
    yield made
    if made._registry is not None:
        made._registry.database.engine.dispose()


@pytest.fixture
def adapter(base_model, tmp_path):
    folder = save_random_adapter(tmp_path / "adapter", base_model)
    detach(base_model)
    return folder


@pytest.mark.parametrize("name", ["orders:1", "acme/orders:12", "a.b-c_d/e:999999999"])
def test_name_and_number_are_a_reference(name):
    assert is_reference(name)


@pytest.mark.parametrize(
    "name",
    [
        "orders",
        "orders:stable",
        "orders:0",
        "orders:01",
        "orders:-1",
        "orders:1 ",
        "orders:1\n",
        "orders:１",
        "ordеrs:1",
        "../orders:1",
        "a/../b:1",
        "/etc/passwd",
        "/etc/passwd:1",
        "~/adapters:1",
        ".hidden:1",
        "a//b:1",
        "orders:1:2",
        "org/model",
        "s3://bucket/a:1",
        "",
        "a" * 300,
    ],
)
def test_all_else_is_not_looked_up_at_all(name, tmp_path, served):
    nowhere = RegistryResolver(str(tmp_path / "no registry here"), served, MAX_RANK)
    assert not is_reference(name)
    assert asyncio.run(nowhere.resolve_lora("base", name)) is None
    assert nowhere._registry is None and nowhere.reason(name) is None


def test_a_version_is_found_as_it_was_registered(registry, resolver, adapter):
    register(registry, adapter, name="acme/orders", **SAID)
    found = resolver.find("acme/orders:1")
    assert found.folder.is_relative_to(registry.cache)
    assert (found.folder / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    assert id_of(found) == id_of(resolver.find("acme/orders:1")) > 0


def test_the_number_of_a_version_follows_its_bytes(registry, resolver, base_model, tmp_path):
    for seed, name in ((1, "one"), (2, "two")):
        register(registry, save_random_adapter(tmp_path / name, base_model, seed), name=name, **SAID)
        detach(base_model)
    assert id_of(resolver.find("one:1")) != id_of(resolver.find("two:1"))


def test_a_copy_that_was_changed_is_fetched_anew(registry, resolver, adapter):
    register(registry, adapter, name="orders", **SAID)
    copy = resolver.find("orders:1").folder
    flip_bit(copy / "adapter_model.safetensors")
    assert resolver.find("orders:1").folder == copy
    assert (copy / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()


def test_what_is_held_is_refused_and_the_reason_kept(registry, resolver, adapter):
    register(registry, adapter, name="orders", **SAID)
    with registry.database.writing() as session:
        session.get_one(AdapterVersion, 1).hold_reason = "a complaint"
    assert asyncio.run(resolver.resolve_lora("base", "orders:1")) is None
    assert isinstance(resolver.reason("orders:1"), RefusedError)
    assert "a complaint" in str(resolver.reason("orders:1"))


def test_what_does_not_exist_is_refused(registry, resolver, adapter):
    register(registry, adapter, name="orders", **SAID)
    for name in ("orders:2", "others:1"):
        assert asyncio.run(resolver.resolve_lora("base", name)) is None
        assert isinstance(resolver.reason(name), RegistryError)


def test_a_registry_that_is_away_is_said_so(tmp_path, served):
    nowhere = RegistryResolver(str(tmp_path / "nowhere"), served, MAX_RANK)
    assert asyncio.run(nowhere.resolve_lora("base", "orders:1")) is None
    assert "no registry" in str(nowhere.reason("orders:1"))


@pytest.mark.parametrize(
    ("kind", "error"), [("other_base", BaseMismatchError), ("dora", UnservableError), ("high_rank", UnservableError)]
)
def test_what_vllm_would_serve_wrongly_is_refused(kind, error, registry, resolver, unfit):
    folder, words = unfit[kind]
    register(registry, folder, name=kind, **SAID)
    with pytest.raises(error, match=words):
        resolver.find(f"{kind}:1")


def test_only_so_many_refusals_are_kept(tmp_path, served, monkeypatch):
    monkeypatch.setattr("luthier.serve.vllm.plugin.KEPT", 3)
    nowhere = RegistryResolver(str(tmp_path / "nowhere"), served, MAX_RANK)
    for number in range(1, 6):
        asyncio.run(nowhere.resolve_lora("base", f"orders:{number}"))
    assert [nowhere.reason(f"orders:{number}") is None for number in range(1, 6)] == [True, True, False, False, False]
