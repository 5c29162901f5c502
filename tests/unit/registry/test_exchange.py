"""Adapters to and from the Hub, through huggingface_hub itself and a hub on this machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.hub import Hub, running_hub

from luthier.core.errors import RegistryError
from luthier.registry.exchange import pull_folder, push_folder

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)), "README.md": b"---\nlicense: mit\n---\n"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """A hub that serves an empty folder as org/tiny; yields (folder, questions asked)."""
    folder = tmp_path / "repo"
    folder.mkdir()
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    with running_hub(folder, monkeypatch) as asked:
        yield folder, asked


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_what_was_pushed_is_pulled_byte_for_byte(hub, tmp_path: Path) -> None:
    folder, asked = hub
    url = push_folder(write(tmp_path / "out", FILES), "org/tiny", message="orders:2")
    assert url.endswith(f"/org/tiny/commit/{Hub.commit}")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert any(question.startswith("POST /api/repos/create") for question in asked)
    told: list[str] = []
    pulled = pull_folder("org/tiny", tmp_path / "in", tell=told.append)
    assert {path.name: path.read_bytes() for path in pulled.folder.iterdir()} == FILES
    assert pulled.commit == Hub.commit and Hub.commit in told[0]


def test_pickles_and_code_stay_on_the_hub(hub, tmp_path: Path) -> None:
    write(hub[0], FILES | {"adapter_model.bin": b"pickle", "train.py": b"raise SystemExit", "vocab.txt": b"a"})
    pulled = pull_folder("org/tiny", tmp_path / "in")
    assert {path.name for path in pulled.folder.iterdir()} == {*FILES, "vocab.txt"}


def test_a_repository_that_is_no_adapter_says_what_it_lacks(hub, tmp_path: Path) -> None:
    write(hub[0], {"config.json": b"{}", "adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    with pytest.raises(RegistryError, match=r"lacks adapter_model\.safetensors\. It holds: adapter_config\.json"):
        pull_folder("org/tiny", tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_an_absent_repository_and_a_forbidden_network_say_so(hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with pytest.raises(RegistryError, match="Cannot pull org/other: the Hub has no such repository"):
        pull_folder("org/other", tmp_path / "in")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub[1])
    for act in (lambda: pull_folder("org/tiny", tmp_path / "in"), lambda: push_folder(tmp_path, "org/tiny", message="")):
        with pytest.raises(RegistryError, match="HF_HUB_OFFLINE forbids the network"):
            act()
    assert len(hub[1]) == asked
