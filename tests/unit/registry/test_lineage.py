"""Questions of lineage, answered by statements, against walks over plain dictionaries."""

import random

import pytest
from sqlalchemy import insert

from luthier.registry import lineage
from luthier.registry.columns import Audience, now
from luthier.registry.database import Database
from luthier.registry.place import Registry
from luthier.registry.schema import (
    Adapter,
    AdapterDataset,
    AdapterParent,
    AdapterVersion,
    Dataset,
    DatasetParent,
    DatasetSubject,
    DatasetVersion,
    Deployment,
    Surface,
)

NUM_DATA, NUM_VERSIONS, NUM_PEOPLE = 17, 43, 7


def reached(start: set[int], edges: set[tuple[int, int]], stop=frozenset()) -> set[int]:
    """Everything reached from `start`, itself included; nothing in `stop` is entered."""
    seen, todo = set(start), list(start)
    while todo:
        here = todo.pop()
        for a, b in edges:
            if a == here and b not in seen and b not in stop:
                seen.add(b)
                todo.append(b)
    return seen


class World:
    """Random data sets and versions as plain sets, and the same as rows."""

    def __init__(self, seed: int):
        draw = random.Random(seed)
        self.digest = {d: f"{d // 2 if draw.random() < 0.2 else d + 100:064d}" for d in range(1, NUM_DATA + 1)}
        self.data_edges = self.edges(draw, NUM_DATA, 14)
        self.version_edges = self.edges(draw, NUM_VERSIONS, 40)
        self.data_edges |= {(NUM_DATA, 1)} if seed % 2 else set()  # a circle, which no command can make
        self.version_edges |= {(NUM_VERSIONS, 1)} if seed % 2 else set()
        self.learned = {(draw.randint(1, NUM_VERSIONS), draw.randint(1, NUM_DATA)) for _ in range(20)}
        self.people = {(draw.randint(1, NUM_DATA), draw.randint(1, NUM_PEOPLE)) for _ in range(12)}
        self.served = {
            v: (draw.choice([1, 2]), draw.choice([0, 10_000]), draw.random() < 0.6) for v in range(1, NUM_VERSIONS + 1, 3)
        }

    @staticmethod
    def edges(draw: random.Random, num: int, count: int) -> set[tuple[int, int]]:
        pairs = {tuple(sorted(draw.sample(range(1, num + 1), 2))) for _ in range(count)}
        return {(a, b) for a, b in pairs}

    def write(self, database: Database) -> None:
        moment = now()
        with database.writing() as session:
            for n in range(1, NUM_DATA + 1):
                session.add(Dataset(id=n, name=f"data-{n:03d}", owner="ana"))
                session.add(DatasetVersion(id=n, dataset_id=n, version=1, digest=self.digest[n]))
            session.add(Adapter(id=1, name="orders", owner="ana", created_by="ana"))
            session.flush()
            session.execute(insert(AdapterVersion), [version_row(n, 1, n) for n in range(1, NUM_VERSIONS + 1)])
            session.add(Surface(id=1, name="shop", audience=Audience.CUSTOMER, owner="ana", rules={}))
            session.add(Surface(id=2, name="desk", audience=Audience.INTERNAL, owner="ana", rules={}))
            session.flush()
            session.add_all(DatasetParent(parent_id=a, child_id=b, transform="mixed") for a, b in self.data_edges)
            session.add_all(AdapterParent(parent_id=a, child_id=b, relation="continued") for a, b in self.version_edges)
            session.add_all(AdapterDataset(version_id=v, dataset_version_id=d) for v, d in self.learned)
            session.add_all(DatasetSubject(dataset_version_id=d, subject_hmac=person(p)) for d, p in self.people)
            session.add_all(
                Deployment(version_id=v, surface_id=s, weight_bp=w, started_by="ana", ended_at=None if is_open else moment)
                for v, (s, w, is_open) in self.served.items()
            )

    def affected(self, data: set[int]) -> set[int]:
        return reached({v for v, d in self.learned if d in data}, self.version_edges)

    def same(self, data: set[int]) -> set[int]:
        return {d for d in self.digest if self.digest[d] in {self.digest[one] for one in data}}

    def by_content(self) -> set[tuple[int, int]]:
        return {(a, twin) for a, b in self.data_edges for twin in self.same({b})}

    def data_with(self, who: int) -> set[int]:
        indexed = self.same({d for d, _ in self.people})
        return reached(self.same({d for d, p in self.people if p == who}), self.by_content(), stop=indexed)

    def data_from(self, one: int) -> set[int]:
        return reached(self.same({one}), self.by_content())


def version_row(identity: int, adapter: int, number: int) -> dict[str, object]:
    nothing = {"recipe": {}, "metrics": {}, "environment": {}, "target_modules": []}
    size = {"rank": 8, "alpha": 16.0, "num_parameters": 7, "size_bytes": 123, "peft_type": "LORA", "lineage_digest": "l"}
    return {
        "id": identity,
        "adapter_id": adapter,
        "version": number,
        "manifest_digest": f"{identity:064d}",
        "created_by": "ana",
        **nothing,
        **size,
    }


def person(number: int) -> bytes:
    return bytes([number]) * 32


@pytest.fixture(params=range(2))
def world(request, any_registry: Registry) -> tuple[World, Database]:
    made = World(request.param)
    made.write(any_registry.database)
    return made, any_registry.database


def check_all_questions(world: World, database: Database) -> None:
    """Every question against the plain walk."""
    with database.reading() as session:
        for one in range(1, NUM_DATA + 1):
            found = lineage.trained_on(session, [one])
            assert {each.id for each in found} == world.affected(world.data_from(one))
            assert {each.id for each in found if each.is_direct} == {v for v, d in world.learned if d in world.data_from(one)}
            assert {each.id for each in lineage.made_of_data(session, [one])} == world.data_from(one)
        for who in range(1, NUM_PEOPLE + 2):
            data = world.data_with(who)
            assert {each.id for each in lineage.holding_person(session, person(who))} == data
            assert {each.id for each in lineage.trained_on_person(session, person(who))} == world.affected(data)
        up, data_up = ({(b, a) for a, b in edges} for edges in (world.version_edges, world.data_edges))
        for one in range(1, NUM_VERSIONS + 1):
            assert {each.id for each in lineage.descendants(session, [one])} == reached({one}, world.version_edges) - {one}
            above = lineage.ancestors(session, one)
            assert {each.id for each in above} == reached({one}, up) - {one}
            assert {each.id for each in above if each.is_direct} == {a for a, b in world.version_edges if b == one}
            family = reached({one}, up)
            seen = reached({d for v, d in world.learned if v in family}, data_up)
            assert {each.id for each in lineage.data_seen(session, one)} == seen
        names = {1: ("shop", Audience.CUSTOMER), 2: ("desk", Audience.INTERNAL)}
        for each in lineage.trained_on(session, range(1, NUM_DATA + 1)):
            surface, weight, is_open = world.served.get(each.id, (0, 0, False))
            told = ((*names[surface], weight),) if weight and is_open else ()
            assert tuple((s.surface, s.audience, s.weight_bp) for s in each.serving) == told


def test_every_question_agrees_with_a_walk_over_plain_sets(world):
    check_all_questions(*world)


def test_a_version_with_an_index_of_its_own_answers_for_itself(world):
    made, database = world
    with database.reading() as session:
        for who in range(1, NUM_PEOPLE + 1):
            cleared = {d for d, _ in made.people} - made.same({d for d, p in made.people if p == who})
            assert cleared.isdisjoint(each.id for each in lineage.holding_person(session, person(who)))
