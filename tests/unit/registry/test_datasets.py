"""Data sets: the digest is the training run's, people are digests under a key, what was erased does not come back."""

import hashlib
import json
import stat
from pathlib import Path

import pytest
from sqlalchemy import select

from luthier.core.errors import ConfigError, DataError, RefusedError, RegistryError
from luthier.data.read import read_rows
from luthier.registry.columns import DataState
from luthier.registry.database import Database
from luthier.registry.datasets import Terms, add_data, add_subjects, find_content, find_version, list_data, show_data
from luthier.registry.people import SubjectColumn, SubjectKey, make_key, read_key
from luthier.registry.place import Registry
from luthier.registry.schema import Blocked, Dataset, DatasetSubject, DatasetVersion, ErasureRequest

ROWS = [{"text": f"row {n}", "user": f"user-{n % 5}"} for n in range(13)]


@pytest.fixture
def database(registry: Registry) -> Database:
    return registry.database


@pytest.fixture
def key(tmp_path: Path) -> SubjectKey:
    return make_key(tmp_path / "keys" / "subject.key")


def write_rows(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def block(database: Database, digest: str, kind: str) -> None:
    with database.writing() as session:
        request = ErasureRequest(kind=kind, target_digest=digest, state="certified", created_by="ana")
        session.add(request)
        session.flush()
        session.add(Blocked(digest=digest, request_id=request.id))


def test_digest_is_the_one_a_training_run_records(database, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    added = add_data(database, "orders", path, Terms(owner="ana"), actor="ana")
    told = hashlib.sha256("".join(json.dumps(r, separators=(",", ":")) + "\n" for r in ROWS).encode()).hexdigest()
    assert added.digest == read_rows(path).digest == told
    assert (added.version, added.num_rows, added.is_new) == (1, 13, True)


def test_rows_and_held_out_rows_have_the_one_digest_of_their_run(database, tmp_path):
    train, held_out = write_rows(tmp_path / "train.jsonl"), write_rows(tmp_path / "held.jsonl", ROWS[:3])
    told = [read_rows(path).digest for path in (train, held_out)]
    added = add_data(database, "orders", train, Terms(owner="ana"), actor="ana", held_out=held_out)
    assert added.digest == hashlib.sha256("".join(told).encode()).hexdigest() and added.num_rows == 16
    with database.reading() as session:
        (shown,) = show_data(session, "orders")
    assert [one["location"] for one in shown["copies"]] == [str(held_out)]


def test_parquet_and_lines_of_the_same_rows_are_one_content(database, tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    first = add_data(database, "orders", write_rows(tmp_path / "rows.jsonl"), Terms(owner="ana"), actor="ana")
    again = add_data(database, "orders", tmp_path / "rows.parquet", Terms(), actor="ana")
    assert (again.version, again.digest, again.is_new) == (1, first.digest, False)
    with database.reading() as session:
        (shown,) = show_data(session, "orders")
    assert shown["copies"] == [{"kind": "data", "location": str(tmp_path / "rows.parquet")}]


def test_folder_digest_tells_names_and_contents_and_no_place(database, tmp_path):
    digests = []
    for place, name, content in (("a", "x", "1"), ("b", "x", "1"), ("c", "y", "1"), ("d", "x", "2")):
        (tmp_path / place / "sub").mkdir(parents=True)
        (tmp_path / place / "sub" / name).write_text(content)
        digests.append(add_data(database, f"set-{place}", tmp_path / place, Terms(owner="ana"), actor="ana").digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_numbers_are_contiguous_and_terms_are_kept(database, tmp_path):
    terms = Terms(owner="ana", license="CC0-1.0", legal_basis="contract", purpose="support", is_special_category=True)
    for n in range(3):
        assert (
            add_data(database, "orders", write_rows(tmp_path / f"{n}.jsonl", ROWS[: n + 1]), terms, actor="ana").version == n + 1
        )
    add_data(database, "orders", tmp_path / "0.jsonl", Terms(purpose="support only"), actor="ana")
    with database.reading() as session:
        told = list_data(session)
    assert [one["version"] for one in told] == [1, 2, 3]
    assert {(one["legal_basis"], one["purpose"], one["license"], one["is_special_category"]) for one in told} == {
        ("contract", "support only", "CC0-1.0", True)
    }


def test_parents_are_recorded_and_do_not_change(database, tmp_path):
    add_data(database, "orders", write_rows(tmp_path / "all.jsonl"), Terms(owner="ana"), actor="ana")
    few = write_rows(tmp_path / "few.jsonl", ROWS[:4])
    add_data(database, "few", few, Terms(owner="ana"), actor="ana", parents=[("orders:1", "filtered")])
    with database.reading() as session:
        assert show_data(session, "few:1")[0]["parents"] == [{"name": "orders:1", "transform": "filtered"}]
        assert show_data(session, "orders")[0]["children"] == [{"name": "few:1", "transform": "filtered"}]
    with pytest.raises(RefusedError, match="other parents"):
        add_data(database, "few", few, Terms(), actor="ana", parents=[("orders:1", "mixed")])
    with pytest.raises(RegistryError, match=r"no data set ordres.*orders"):
        add_data(database, "few", few, Terms(), actor="ana", parents=[("ordres:1", "mixed")])


def test_a_new_data_set_needs_an_owner_and_a_name(database, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(RegistryError, match="--owner"):
        add_data(database, "orders", path, Terms(), actor="ana")
    with pytest.raises(RegistryError, match="cannot name"):
        add_data(database, "orders:1", path, Terms(owner="ana"), actor="ana")
    with database.reading() as session:
        assert session.scalars(select(Dataset)).all() == []


def test_people_are_kept_as_hmacs_that_need_the_key(database, tmp_path, key):
    rows = [*ROWS, {"text": "two", "user": ["user-1", "user-9"]}, {"text": "nobody", "user": None}, {"text": "none"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    added = add_data(database, "orders", path, Terms(owner="ana"), actor="ana", subjects=SubjectColumn("user", key))
    assert added.num_subjects == 6
    with database.reading() as session:
        kept = set(session.scalars(select(DatasetSubject.subject_hmac)))
    assert key.hmac("user-9") in kept and key.hmac("user-7") not in kept
    assert {hashlib.sha256(f"user-{n}".encode()).digest() for n in range(10)}.isdisjoint(kept)
    files = b"".join(file.read_bytes() for file in (tmp_path / "registry").glob("registry.sqlite3*"))
    assert key.hmac("user-9") in files and b"user-9" not in files


def test_subjects_added_later_must_be_of_the_same_rows(database, tmp_path, key):
    add_data(database, "orders", write_rows(tmp_path / "rows.jsonl"), Terms(owner="ana"), actor="ana")
    other = write_rows(tmp_path / "other.jsonl", ROWS[:5])
    with pytest.raises(DataError, match="does not hold the rows of orders:1"):
        add_subjects(database, "orders:1", other, SubjectColumn("user", key), actor="ana")
    with pytest.raises(DataError, match=r"No row .* 'customer'"):
        add_subjects(database, "orders:1", tmp_path / "rows.jsonl", SubjectColumn("customer", key), actor="ana")
    for _ in range(2):
        assert add_subjects(database, "orders:1", tmp_path / "rows.jsonl", SubjectColumn("user", key), actor="ana") == 5
    with database.reading() as session:
        assert len(session.scalars(select(DatasetSubject.subject_hmac)).all()) == 5


def test_another_key_is_refused_since_it_would_find_nobody(database, tmp_path, key):
    path = write_rows(tmp_path / "rows.jsonl")
    add_data(database, "orders", path, Terms(owner="ana"), actor="ana", subjects=SubjectColumn("user", key))
    other = make_key(tmp_path / "other.key")
    with pytest.raises(RefusedError, match="would find nobody"):
        add_subjects(database, "orders:1", path, SubjectColumn("user", other), actor="ana")


def test_key_file_is_private_and_never_made_by_asking(tmp_path, key):
    path = tmp_path / "keys" / "subject.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_key(path).hmac(17) == key.hmac("17") == make_key(path).hmac("17")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key(path)
    with pytest.raises(RegistryError, match="no key at"):
        read_key(tmp_path / "none.key")
    assert not (tmp_path / "none.key").exists()


def test_a_content_is_found_in_every_data_set_that_holds_it(database, tmp_path):
    path, other = write_rows(tmp_path / "rows.jsonl"), write_rows(tmp_path / "few.jsonl", ROWS[:3])
    for name, rows in (("orders", other), ("zebra", path), ("orders", path)):
        digest = add_data(database, name, rows, Terms(owner="ana"), actor="ana").digest
    with database.reading() as session:
        assert [(one.dataset.name, one.version) for one in find_content(session, digest)] == [("zebra", 1), ("orders", 2)]
        assert find_content(session, "0" * 64) == []
        for named, told in (
            ("zebar:1", "Did you mean 'zebra'"),
            ("orders:7", "luthier registry data show orders"),
            ("nothing", "luthier registry data add"),
            ("orders", "say which, as in orders:2"),
        ):
            with pytest.raises(RegistryError, match=told):
                find_version(session, named)


def test_frozen_and_erased_content_does_not_come_back(database, tmp_path, key):
    path = write_rows(tmp_path / "rows.jsonl")
    digest = add_data(database, "orders", path, Terms(owner="ana"), actor="ana").digest
    with database.writing() as session:
        session.scalars(select(DatasetVersion)).one().state = DataState.FROZEN
    with pytest.raises(RefusedError, match="frozen"):
        add_data(database, "same", path, Terms(owner="ana"), actor="ana")
    few = write_rows(tmp_path / "few.jsonl", ROWS[:3])
    with pytest.raises(RefusedError, match="parent orders:1 is frozen"):
        add_data(database, "few", few, Terms(owner="ana"), actor="ana", parents=[("orders:1", "filtered")])
    block(database, digest, "dataset")
    with pytest.raises(RefusedError, match="erased and may not come back"):
        add_data(database, "same", path, Terms(owner="ana"), actor="ana")
    block(database, key.hmac("user-2").hex(), "subject")
    with pytest.raises(RefusedError, match="rows of 1 person who were erased"):
        add_data(database, "few", few, Terms(owner="ana"), actor="ana", subjects=SubjectColumn("user", key))
    with database.reading() as session:
        assert find_version(session, "orders").version == 1
        assert len(session.scalars(select(Dataset)).all()) == 1
