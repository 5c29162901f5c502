"""A name that is known to others and one that nobody knows take the same way: one look into one dictionary."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.gateway_scene import KEY, ScriptedBackend, caller, version, view

from luthier.registry.view import ServingView
from luthier.serve.errors import ApiError
from luthier.serve.gateway import Gateway
from luthier.serve.settings import ServeSettings
from luthier.serve.views import FixedViews


class Watched(dict[Any, Any]):
    """A dictionary that notes every look into it."""

    def __init__(self, content: Any, name: str, notes: list[tuple[str, str]]):
        super().__init__(content)
        self._name, self._notes = name, notes

    def get(self, key: Any, default: Any = None) -> Any:
        """Look, and note it."""
        self._notes.append((self._name, "get"))
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self._notes.append((self._name, "item"))
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        self._notes.append((self._name, "walk"))
        return super().__iter__()

    def items(self) -> Any:
        """Walk, and note it."""
        self._notes.append((self._name, "walk"))
        return super().items()


def test_a_foreign_name_and_a_name_of_nothing_take_the_same_way() -> None:
    notes: list[tuple[str, str]] = []
    plain = view(1, callers={KEY: caller(), "rival": caller(tenant=2)}, **{"orders:1": version(1)})
    theirs = {"secrets:1": version(2, "secrets")}
    watched: ServingView = replace(
        plain, names=Watched({1: Watched(plain.names[1], "acme", notes), 2: Watched(theirs, "rival", notes)}, "tenants", notes)
    )
    gateway = Gateway(ServeSettings(served_name="base"), ScriptedBackend(), None, FixedViews(plain))

    async def scenario() -> None:
        gateway.residency.view = watched
        who = gateway.caller(f"Bearer {KEY}")
        ways = []
        for name in ("secrets:1", "nothing:1", "../secrets:1", "orders:1\0"):
            notes.clear()
            with pytest.raises(ApiError):
                gateway.route(who, name, unit=gateway.unit_of(who, "orders:1", user="u"))
            ways.append(list(notes))
        assert all(way == [("tenants", "get"), ("acme", "get")] * 2 for way in ways)

    asyncio.run(scenario())
