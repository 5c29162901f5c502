"""`luthier inspect` on an adapter that the loop has trained: tables, JSON, pictures, the report, and what is said of the base."""

import base64
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

Luthier = Callable[..., Any]
PATH = "model.layers.0.self_attn.v_proj"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give tables a line for each row."""
    monkeypatch.setenv("COLUMNS", "240")


@pytest.fixture(scope="module")
def update(trained: Path) -> torch.Tensor:
    """Return the dense update of one layer in float64, from the file by hand; alpha / r is 2."""
    stored = load_file(trained / "adapter" / "adapter_model.safetensors")
    lora_A, lora_B = (stored[f"base_model.model.{PATH}.{part}.weight"].double() for part in ("lora_A", "lora_B"))
    return 2 * lora_B @ lora_A


@pytest.fixture(scope="module")
def weight(tiny_folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).get_parameter(f"{PATH}.weight").detach()


def layer_of(found: dict[str, Any], path: str = PATH) -> dict[str, Any]:
    (layer,) = (layer for layer in found["layers"] if layer["path"] == path)
    return layer


def test_json_has_the_spectra_and_the_share_of_the_base(
    luthier: Luthier, trained: Path, update: torch.Tensor, weight: torch.Tensor
) -> None:
    said = luthier("inspect", trained, "--json", "--energy", "0.9")
    assert said.status == 0, said.err
    found = json.loads(said.out)
    layer, S = layer_of(found), torch.linalg.svdvals(update)
    assert layer["singular_values"] == pytest.approx(S[: len(layer["singular_values"])].tolist(), rel=1e-9, abs=1e-12)
    held = (S.square().cumsum(0) / S.square().sum()).tolist()
    assert layer["suggested_rank"] == next(r for r, share in enumerate(held, 1) if share >= 0.9)
    assert layer["base"]["share"] == pytest.approx((update.norm() / weight.double().norm()).item(), rel=1e-6)
    error = (weight.bfloat16().float() + update.float()).bfloat16().double() - weight.bfloat16().double() - update
    assert layer["base"]["rounded_away"] == pytest.approx((error.norm() / update.norm()).item(), rel=1e-3)
    assert any("no rank of the task" in remark for remark in found["remarks"])
    assert found["similarity"] is None and found["plots"] == []


def test_without_a_base_the_columns_are_absent_and_the_reason_is_said(luthier: Luthier, trained: Path, tmp_path: Path) -> None:
    with_base = luthier("inspect", trained, "--layers")
    assert "rounded away" in with_base.out and "No share" not in with_base.out
    without = luthier("inspect", trained, "--layers", "--base", "none")
    assert without.status == 0 and PATH in without.out and "rank for 0.95" in without.out
    assert "rounded away" not in without.out and "No share of the base's weight: left out, as asked." in without.out
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (moved / name).write_bytes((trained / "adapter" / name).read_bytes())
    config = json.loads((moved / "adapter_config.json").read_text())
    for named, reason in (("elsewhere/large", "is not on this machine"), (None, "does not name its base")):
        (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        found = json.loads(luthier("inspect", "moved", "--json").out)
        assert any(reason in remark for remark in found["remarks"])
        assert layer_of(found)["base"] is None


def test_the_base_is_named_in_the_call(luthier: Luthier, trained: Path, tiny_folder: Path, tmp_path: Path) -> None:
    said = luthier("inspect", trained, "--layers", "--base", tiny_folder)
    assert said.status == 0 and "rounded away" in said.out
    absent = luthier("inspect", trained, "--base", "./absent")
    assert absent.status == 1 and "absent" in absent.err


class Seen(HTMLParser):
    """Collects the tags, what they point to, and the words of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_pictures_and_a_report_that_needs_nothing_else(luthier: Luthier, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert luthier("truncate", trained, "-o", "cut", "--rank", "3").status == 0
    said = luthier("inspect", trained, "--against", "cut", "--plot", "pictures", "--html", "report/page.html")
    assert said.status == 0, said.err
    names = ["norms.png", "similarity.png", "spectra.png"]
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == names
    page = Seen()
    page.feed((tmp_path / "report/page.html").read_text())
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    inside = [base64.b64decode(link.removeprefix("data:image/png;base64,"), validate=True) for link in page.links]
    assert sorted(inside) == sorted((tmp_path / "pictures" / name).read_bytes() for name in names)
    assert all(picture.startswith(b"\x89PNG") for picture in inside)
    for words in (PATH, "rounded away", "no rank of the task", "cosine"):
        assert words in page.words
    assert "@import" not in page.words and "url(" not in page.words


def test_what_a_truncated_adapter_kept_is_the_same_and_what_it_lost_is_not(luthier: Luthier, trained: Path) -> None:
    assert luthier("truncate", trained, "-o", "cut", "--rank", "3").status == 0
    found = json.loads(luthier("inspect", trained, "--against", "cut", "--json", "--base", "none").out)
    for layer in found["similarity"]["layers"]:
        assert layer["ranks"][1] == 3
        for side in ("left", "right"):
            assert [layer[side][i][i] for i in range(3)] == pytest.approx([1, 1, 1], abs=1e-4)
        # The truncated update is a projection of the whole one, so the cosine is the root of the energy that it holds.
        assert layer["cosine"] == pytest.approx(layer_of(found, layer["path"])["energy"][2] ** 0.5, rel=1e-6)
    text = luthier("inspect", trained, "--against", "cut")
    (row,) = re.findall(rf"^ *{re.escape(PATH)} .*$", text.out, re.MULTILINE)
    assert row.split()[-1] == f"{layer_of(found)['energy'][2] ** 0.5:+.3f}"


def test_drawing_without_matplotlib_says_how_to_get_it(
    luthier: Luthier, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for words in (("--plot", "pictures"), ("--html", "page.html")):
        said = luthier("inspect", trained, *words)
        assert said.status == 1 and "pip install 'luthier[plots]'" in said.err
    assert not (tmp_path / "pictures").exists() and not (tmp_path / "page.html").exists()
    assert luthier("inspect", trained, "--layers").status == 0


def test_a_share_that_is_none_is_refused(luthier: Luthier, trained: Path) -> None:
    said = luthier("inspect", trained, "--energy", "95")
    assert said.status == 2 and "--energy is 95" in said.err
