"""The store of adapters: read once and elsewhere, one entry for one content, nothing in use evicted, and nothing left behind."""

import json
import random
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.served_adapters import TENSORS, cut_short, flip_bit, lose_tensors, poison, put_nan, save_random_adapter
from torch import nn

from luthier.core.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterStateError,
    BaseMismatchError,
    BlobError,
    LuthierError,
    RefusedError,
    RegistryError,
)
from luthier.engine.adapters import AdapterWeights, ServedBase
from luthier.engine.store import AdapterStore, RegisteredSource, Residency
from luthier.formats.folder import AdapterFolder, read_adapter
from luthier.registry import schema
from luthier.registry.place import Registry, open_registry
from luthier.registry.registering import register

Make = Callable[..., nn.Module]
Folders = Callable[..., Path]
Stores = Callable[..., AdapterStore]
PLENTY = 2**30
LONG = 300.0
"""Seconds after which a test gives up waiting for what happens at once; nothing depends on its size."""


@pytest.fixture(scope="module")
def folders(tiny_llama: Make, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return a function that gives the folder of an adapter of `tiny_llama()`, one for each seed; not to be changed."""
    home = tmp_path_factory.mktemp("adapters")

    def folder_of(seed: int) -> Path:
        folder = home / f"a{seed}"
        return folder if folder.exists() else save_random_adapter(folder, tiny_llama(), seed)

    return folder_of


@pytest.fixture
def copied(folders: Folders, tmp_path: Path) -> Folders:
    """Return a function that gives a copy of such a folder for the test to spoil."""
    return lambda seed, name="copy": Path(shutil.copytree(folders(seed), tmp_path / name))


@pytest.fixture
def stores(tiny_llama: Make) -> Iterator[Stores]:
    """Return a factory of empty stores for `tiny_llama()`, which end with the test."""
    base, made = ServedBase.of(tiny_llama()), []

    def make(limit_bytes: int = PLENTY, workers: int = 1) -> AdapterStore:
        made.append(AdapterStore(base, limit_bytes, workers))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture(scope="module")
def size(folders: Folders, tiny_llama: Make) -> int:
    """Bytes of one adapter in memory, counted from its file: these are float32 there as here."""
    return sum(4 * tensor.numel() for tensor in read_adapter(folders(0)).tensors.values())


class Gated:
    """A source that says when it is asked and from which thread, and waits to be let on."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked, self.may_go = threading.Event(), threading.Event()
        self.threads: list[int] = []

    def __call__(self) -> AdapterFolder:
        self.threads.append(threading.get_ident())
        self.asked.set()
        assert self.may_go.wait(LONG)
        return read_adapter(self.folder)


def got(future: Future[AdapterWeights]) -> AdapterWeights:
    return future.result(LONG)


def told(store: AdapterStore, name: str) -> Residency:
    (found,) = [each for each in store.residency().adapters if each.name == name]
    return found


def use_once(store: AdapterStore, name: str) -> str:
    key = got(store.acquire(name)).key
    store.release(key)
    return key


# --- reading ---------------------------------------------------------------------------------------------------------


def test_nothing_is_read_before_somebody_asks(stores: Stores, copied: Folders) -> None:
    store, folder = stores(), copied(0)
    store.add("a", folder)
    shutil.move(folder, folder.with_name("elsewhere"))
    assert told(store, "a") == Residency("a", "known", None, 0, 0, 0, 0.0, 0, None)
    with pytest.raises(AdapterFormatError, match="is not an adapter folder"):
        got(store.acquire("a"))
    shutil.move(folder.with_name("elsewhere"), folder)
    assert got(store.acquire("a")).name == "a"  # who asks next has it tried again


def test_reading_is_left_to_another_thread(stores: Stores, folders: Folders) -> None:
    store, source = stores(), Gated(folders(0))
    store.add("a", source)
    future = store.acquire("a")
    assert source.asked.wait(LONG) and not future.done()
    assert told(store, "a").state == "loading"
    source.may_go.set()
    assert set(got(future).pairs) == {
        f"model.layers.{layer}.{place}" for layer in (0, 1) for place in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert source.threads and threading.get_ident() not in source.threads
    assert told(store, "a").state == "resident"


def test_many_who_ask_at_once_have_it_read_once(stores: Stores, folders: Folders) -> None:
    store, source = stores(workers=4), Gated(folders(0))
    store.add("a", source)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(store.acquire, "a") for _ in range(8)]
        assert source.asked.wait(LONG)
        futures = [each.result(LONG) for each in asked]
    source.may_go.set()
    first, *others = [got(future) for future in futures]
    assert all(other is first for other in others)
    assert (len(source.threads), store.residency().loads, told(store, "a").uses) == (1, 1, 8)
    for _ in range(8):
        store.release(first.key)
    assert told(store, "a").uses == 0 and got(store.acquire("a")) is first


def test_one_who_waits_for_a_slow_disk_keeps_no_other_up(stores: Stores, folders: Folders) -> None:
    store, slow = stores(workers=2), Gated(folders(0))
    store.add("slow", slow)
    store.add("quick", folders(1))
    waiting = store.acquire("slow")
    assert slow.asked.wait(LONG)
    assert got(store.acquire("quick")).name == "quick" and not waiting.done()
    slow.may_go.set()
    got(waiting)


def test_whoever_gave_up_waiting_holds_nothing(stores: Stores, folders: Folders) -> None:
    store, source = stores(), Gated(folders(0))
    store.add("a", source)
    given_up, waits = store.acquire("a"), store.acquire("a")
    assert source.asked.wait(LONG) and given_up.cancel()
    source.may_go.set()
    key = got(waits).key
    assert told(store, "a").uses == 1
    store.release(key)
    with pytest.raises(AdapterStateError, match="released once"):
        store.release(key)


# --- content ---------------------------------------------------------------------------------------------------------


def test_two_names_of_one_content_are_one_entry(stores: Stores, folders: Folders, copied: Folders, size: int) -> None:
    store = stores()
    store.add("a", folders(0))
    store.add("again", copied(0, "another-folder"))
    one, other = got(store.acquire("a")), got(store.acquire("again"))
    assert one is other and one.bytes == size
    assert (store.residency().resident_bytes, told(store, "a").uses, told(store, "again").uses) == (size, 2, 2)


def test_two_names_of_one_content_that_arrive_together_are_one_entry(stores: Stores, folders: Folders, size: int) -> None:
    store, sources = stores(workers=2), [Gated(folders(0)), Gated(folders(0))]
    futures = []
    for name, source in zip(("a", "again"), sources, strict=True):
        store.add(name, source)
        futures.append(store.acquire(name))
        assert source.asked.wait(LONG)
    for source in sources:
        source.may_go.set()
    one, other = map(got, futures)
    assert one is other and store.residency().resident_bytes == size


def test_one_digit_of_the_configuration_makes_another_adapter(stores: Stores, folders: Folders, copied: Folders) -> None:
    store, folder = stores(), copied(0)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] + 1}))
    (folder / "luthier.json").unlink()
    store.add("a", folders(0))
    store.add("b", folder)
    one, other = got(store.acquire("a")), got(store.acquire("b"))
    assert one.key != other.key
    path = "model.layers.1.mlp.down_proj"
    torch.testing.assert_close(other.pairs[path].B, one.pairs[path].B * 6 / 5)


def test_a_folder_that_was_changed_has_to_be_added_again(stores: Stores, folders: Folders, copied: Folders, size: int) -> None:
    store, folder = stores(limit_bytes=size), copied(0)
    store.add("a", folder)
    store.add("other", folders(1))
    before = use_once(store, "a")
    shutil.rmtree(folder)
    shutil.copytree(folders(2), folder)
    assert use_once(store, "a") == before  # from memory: what was verified
    use_once(store, "other")  # takes its place
    with pytest.raises(AdapterFormatError, match=r"changed since adapter 'a' was first read.*add it again"):
        got(store.acquire("a"))
    store.add("a", folder)
    assert use_once(store, "a") not in (before, None)


def test_a_name_given_anew_leaves_those_alone_who_have_the_old_one(stores: Stores, folders: Folders, size: int) -> None:
    store = stores()
    store.add("a", folders(0))
    old = got(store.acquire("a"))
    store.add("a", folders(1))
    new = got(store.acquire("a"))
    assert new.key != old.key and store.residency().resident_bytes == 2 * size
    assert sorted(each.state for each in store.residency().adapters) == ["draining", "resident"]
    store.release(old.key)
    assert store.residency().resident_bytes == size
    assert got(store.acquire("a")) is new


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_one_unused_for_longest_goes_first_and_comes_back(stores: Stores, folders: Folders, size: int) -> None:
    store = stores(limit_bytes=2 * size)
    for seed in range(3):
        store.add(f"a{seed}", folders(seed))
    use_once(store, "a0")
    use_once(store, "a1")
    use_once(store, "a0")
    use_once(store, "a2")
    assert [told(store, f"a{seed}").state for seed in range(3)] == ["resident", "known", "resident"]
    assert (told(store, "a1").evictions, store.residency().evictions) == (1, 1)
    use_once(store, "a1")
    assert told(store, "a1").loads == 2 and told(store, "a0").state == "known"


def test_what_somebody_holds_stays_whatever_else_is_wanted(stores: Stores, folders: Folders, size: int) -> None:
    store = stores(limit_bytes=2 * size)
    for seed in range(3):
        store.add(f"a{seed}", folders(seed))
    held = [got(store.acquire(f"a{seed}")) for seed in range(2)]
    with pytest.raises(AdapterStateError, match=rf"'a2' needs {size:,} bytes, and {2 * size:,} of the {2 * size:,}") as refusal:
        got(store.acquire("a2"))
    assert "raise the limit" in str(refusal.value)
    assert got(store.acquire("a0")) is held[0]  # who asks for what is there does not notice
    store.release(held[1].key)
    assert got(store.acquire("a2")).name == "a2"
    assert [told(store, f"a{seed}").state for seed in range(3)] == ["resident", "known", "resident"]


def test_an_adapter_larger_than_the_whole_room_is_refused(stores: Stores, folders: Folders, size: int) -> None:
    store = stores(limit_bytes=size - 1)
    store.add("a", folders(0))
    with pytest.raises(AdapterStateError, match=rf"and 0 of the {size - 1:,}"):
        got(store.acquire("a"))


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_asked_in_whatever_order(seed: int, stores: Stores, folders: Folders, size: int) -> None:
    """A walk of several hundred calls, beside a list of who holds what: held is there, the room is kept, the end is empty."""
    chance = random.Random(seed)
    store = stores(limit_bytes=2 * size + size // 2, workers=2)
    held: list[AdapterWeights] = []
    known: set[str] = set()
    leaving: list[Future[None]] = []
    for _ in range(300):
        name = f"a{chance.randrange(6)}"
        turn = chance.random()
        if name not in known:
            store.add(name, folders(int(name[1:]) // 2))  # pairs of names share a content
            known.add(name)
        elif turn < 0.45:
            future = store.acquire(name)
            if isinstance(future.exception(LONG), AdapterStateError):
                assert len({each.key for each in held}) == 2, "it was refused though there was room"
            else:
                held.append(got(future))
        elif turn < 0.9 and held:
            store.release(held.pop(chance.randrange(len(held))).key)
        elif turn > 0.95:
            leaving.append(store.unload(name))
            known.discard(name)
        report = store.residency()
        assert report.resident_bytes <= store.limit_bytes
        assert report.bytes_in_use == size * len({each.key for each in held})
    for each in held:
        store.release(each.key)
    for future in [*leaving, *map(store.unload, known)]:
        future.result(LONG)
    assert (store.residency().adapters, store.residency().resident_bytes) == ((), 0)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (cut_short, AdapterFormatError, "truncated, damaged or edited"),
        (poison, AdapterFormatError, "changed since the adapter was saved"),
        (lambda folder: flip_bit(folder / TENSORS), AdapterFormatError, "changed since the adapter was saved"),
        (put_nan, AdapterFormatError, "1 of 8 tensors hold NaN or infinity"),
        (lose_tensors, AdapterFormatError, f"has no {TENSORS}"),
        (lambda folder: (folder / "adapter_config.json").unlink(), AdapterFormatError, "is not an adapter folder"),
    ],
    ids=["cut short", "poisoned", "one bit", "nan", "no tensors", "no configuration"],
)
def test_damage_is_told_to_who_asked_and_to_nobody_else(
    spoil: Callable[[Path], None],
    kind: type[LuthierError],
    words: str,
    stores: Stores,
    folders: Folders,
    copied: Folders,
) -> None:
    store, folder = stores(), copied(0, "bad")
    store.add("good", folders(1))
    good = got(store.acquire("good"))
    spoil(folder)
    store.add("bad", folder)
    both = store.acquire("bad"), store.acquire("bad")
    for future in both:
        with pytest.raises(kind, match=words) as caught:
            got(future)
        assert str(folder) in str(caught.value)
    found = told(store, "bad")
    assert (found.state, found.bytes, found.uses) == ("failed", 0, 0) and found.error == str(caught.value)
    assert store.residency().failures == found.loads >= 1
    assert got(store.acquire("good")) is good
    shutil.rmtree(folder)
    shutil.copytree(folders(0), folder)
    assert got(store.acquire("bad")).name == "bad" and told(store, "bad").error is None


def test_the_adapter_of_another_base_is_refused(stores: Stores, tiny_llama: Make, tmp_path: Path) -> None:
    store = stores()
    store.add("same shape", save_random_adapter(tmp_path / "same", tiny_llama(seed=1)))
    store.add("wider", save_random_adapter(tmp_path / "wider", tiny_llama(hidden=56)))
    with pytest.raises(BaseMismatchError, match="was trained on another base"):
        got(store.acquire("same shape"))
    with pytest.raises(AdapterMismatchError, match=r"lora_A.weight is \(3, 56\), needs \(3, 48\)"):
        got(store.acquire("wider"))
    assert store.residency().resident_bytes == 0


def test_an_unknown_name_is_told_with_what_it_may_mean(stores: Stores, folders: Folders) -> None:
    store = stores()
    store.add("orders", folders(0))
    with pytest.raises(AdapterStateError, match=r"no adapter 'order' here.*'orders'"):
        store.acquire("order")
    with pytest.raises(AdapterStateError, match="no adapter 'order' here"):
        store.unload("order")


# --- unloading -------------------------------------------------------------------------------------------------------


def test_what_is_held_is_freed_after_its_release_and_then_it_is_gone(stores: Stores, folders: Folders) -> None:
    store = stores()
    store.add("a", folders(0))
    holders = [store.acquire("a"), store.acquire("a")]
    weights = got(holders[0])
    seen, key = weakref.ref(weights), got(holders[1]).key
    done = store.unload("a")
    assert told(store, "a").state == "draining"
    with pytest.raises(AdapterStateError, match="is being unloaded; add it again"):
        store.acquire("a")
    store.release(key)
    assert not done.done() and store.residency().bytes_in_use > 0
    del weights
    holders.clear()
    assert seen() is not None  # the one that is left keeps it, by the store alone
    store.release(key)
    done.result(LONG)
    assert seen() is None
    assert (store.residency().adapters, store.residency().resident_bytes) == ((), 0)


def test_what_nobody_holds_goes_at_once(stores: Stores, folders: Folders) -> None:
    store = stores()
    store.add("never asked for", folders(0))
    store.unload("never asked for").result(LONG)
    store.add("a", folders(0))
    use_once(store, "a")
    store.unload("a").result(LONG)
    assert store.residency().resident_bytes == 0
    store.add("a", folders(0))
    use_once(store, "a")
    assert told(store, "a").loads == 1 and store.residency().loads == 2


def test_who_waited_when_it_was_unloaded_still_gets_it(stores: Stores, folders: Folders) -> None:
    store, source = stores(), Gated(folders(0))
    store.add("a", source)
    waits = store.acquire("a")
    assert source.asked.wait(LONG)
    done = store.unload("a")
    source.may_go.set()
    key = got(waits).key
    assert not done.done()
    store.release(key)
    done.result(LONG)
    assert store.residency().resident_bytes == 0


def test_unloading_what_cannot_be_read_ends_too(stores: Stores, copied: Folders) -> None:
    store, folder = stores(), copied(0)
    lose_tensors(folder)
    source = Gated(folder)
    store.add("a", source)
    waits = store.acquire("a")
    assert source.asked.wait(LONG)
    done = store.unload("a")
    source.may_go.set()
    with pytest.raises(AdapterFormatError):
        got(waits)
    done.result(LONG)
    assert store.residency().adapters == ()


def test_a_content_stays_for_its_other_name(stores: Stores, folders: Folders, copied: Folders, size: int) -> None:
    store = stores()
    store.add("a", folders(0))
    store.add("again", copied(0))
    held = got(store.acquire("a"))
    assert got(store.acquire("again")) is held
    store.unload("a").result(LONG)
    assert store.residency().resident_bytes == size
    assert got(store.acquire("again")) is held
    for _ in range(3):
        store.release(held.key)
    store.unload("again").result(LONG)
    assert store.residency().resident_bytes == 0


def test_a_closed_store_gives_nothing_and_waits_for_what_is_read(tiny_llama: Make, folders: Folders) -> None:
    store, source = AdapterStore(ServedBase.of(tiny_llama()), PLENTY), Gated(folders(0))
    store.add("a", source)
    waits = store.acquire("a")
    assert source.asked.wait(LONG)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(store.close)
        source.may_go.set()
        closing.result(LONG)
    assert waits.done()
    store.release(got(waits).key)
    with pytest.raises(AdapterStateError, match="no adapter 'a' here"):
        store.acquire("a")
    assert store.residency().resident_bytes == 0


# --- from a registry -------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path, folders: Folders) -> Iterator[Registry]:
    """Return a registry on SQLite with two versions of `orders`, the first of which is `orders:stable`."""
    opened = open_registry(tmp_path / "registry", create=True)
    for seed in range(2):
        register(opened, folders(seed), name="orders", actor="ann", owner="team", no_data_reason="a test")
    point_stable_to(opened, 1)
    yield opened
    opened.database.engine.dispose()


def point_stable_to(registry: Registry, version: int) -> None:
    with registry.database.writing() as session:
        session.merge(schema.Alias(adapter_id=1, name="stable", version_id=version))


def stored(registry: Registry, version: int, name: str = TENSORS) -> Path:
    """Return where the registry keeps a file of a version."""
    with registry.database.reading() as session:
        digest = session.get_one(schema.AdapterFile, (version, name)).blob_digest
    (found,) = [file for file in Path(registry.place).parent.rglob("*") if file.is_file() and file.name.endswith(digest[4:])]
    return found


@pytest.mark.parametrize("reference", ["orders:1", "orders:stable"])
def test_a_registered_version_is_what_was_registered(
    reference: str, registry: Registry, stores: Stores, folders: Folders
) -> None:
    store = stores()
    store.add("served", RegisteredSource(registry, reference))
    store.add("from its folder", folders(0))
    weights = got(store.acquire("served"))
    assert weights is got(store.acquire("from its folder"))  # the same bytes, so the same content


def test_an_alias_means_the_version_that_it_named_when_it_was_read(
    registry: Registry, stores: Stores, folders: Folders, size: int
) -> None:
    store = stores(limit_bytes=size)
    store.add("served", RegisteredSource(registry, "orders:stable"))
    store.add("other", folders(2))
    before = use_once(store, "served")
    point_stable_to(registry, 2)
    use_once(store, "other")  # evicts it, so that it is read once more
    assert use_once(store, "served") == before
    store.add("served", RegisteredSource(registry, "orders:stable"))
    assert use_once(store, "served") != before


def test_a_flipped_bit_in_the_registry_is_refused(registry: Registry, stores: Stores) -> None:
    store = stores()
    flip_bit(stored(registry, 1))
    store.add("served", RegisteredSource(registry, "orders:1"))
    with pytest.raises(BlobError, match="is damaged"):
        got(store.acquire("served"))
    assert told(store, "served").state == "failed" and store.residency().resident_bytes == 0


def test_a_flipped_bit_in_a_fetched_copy_is_healed(registry: Registry, stores: Stores, folders: Folders, size: int) -> None:
    store = stores(limit_bytes=size)
    store.add("served", RegisteredSource(registry, "orders:1"))
    store.add("other", folders(2))
    before = use_once(store, "served")
    (fetched,) = registry.cache.rglob(TENSORS)
    flip_bit(fetched)
    use_once(store, "other")
    assert use_once(store, "served") == before


def test_files_that_change_between_their_check_and_their_reading_are_refused(
    registry: Registry, stores: Stores, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check and the reading are two looks at a file; what is used has to be what was checked."""
    from luthier.registry import resolving

    def resolve_then_swap(*asked: object) -> resolving.Resolved:
        resolved = resolving_version(*asked)
        for file in folders(1).iterdir():  # another adapter, whole in itself
            (resolved.folder / file.name).chmod(0o644)
            shutil.copy(file, resolved.folder / file.name)
        return resolved

    resolving_version = resolving.resolve_version
    monkeypatch.setattr(resolving, "resolve_version", resolve_then_swap)
    store = stores()
    store.add("served", RegisteredSource(registry, "orders:1"))
    with pytest.raises(BlobError, match=r"adapter_model\.safetensors.* is not the file that was registered"):
        got(store.acquire("served"))


def test_what_may_not_be_used_or_is_not_there_is_told(registry: Registry, stores: Stores) -> None:
    store = stores()
    with registry.database.writing() as session:
        session.get_one(schema.AdapterVersion, 2).hold_reason = "under review"
    store.add("held", RegisteredSource(registry, "orders:2"))
    store.add("absent", RegisteredSource(registry, "orders:7"))
    with pytest.raises(RefusedError, match="under review"):
        got(store.acquire("held"))
    with pytest.raises(RegistryError, match="There is no orders:7"):
        got(store.acquire("absent"))
