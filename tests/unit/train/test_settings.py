"""Settings of a run: from TOML and overrides, refused where they are wrong, and written so that they read back equal."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.config import LoraConfig
from luthier.core.errors import ConfigError
from luthier.train.settings import RunSettings, read_settings, settings_of_recipe

WHOLE = """
model = "base"
out = "run"
dtype = "float32"

[data]
path = "rows.jsonl"
eval_fraction = 0.25

[lora]
r = 5
target_modules = ["q_proj", "v_proj"]
rank_pattern = { "layers.0.*" = 7 }

[train]
learning_rate = 3e-4
betas = [0.8, 0.95]
patience = 3
"""


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(WHOLE)
    return tmp_path / "run.toml"


def least(**top: object) -> RunSettings:
    return RunSettings(**({"model": "base", "out": "run", "data": {"path": "rows.jsonl"}} | top))


def test_a_file_gives_what_it_says(whole: Path) -> None:
    settings = read_settings(whole)
    assert (settings.model, settings.data.eval_fraction, settings.lora.r) == ("base", 0.25, 5)
    assert settings.lora.rank_pattern == {"layers.0.*": 7}
    assert settings.train.betas == (0.8, 0.95)


def test_overrides_win_over_the_file_and_leave_the_rest(whole: Path) -> None:
    settings = read_settings(whole, {"model": None, "lora": {"r": 9, "lora_alpha": None}, "train": {"seed": 3}})
    assert (settings.model, settings.lora.r, settings.train.seed) == ("base", 9, 3)
    assert settings.lora.target_modules == ["q_proj", "v_proj"]
    assert settings.train.learning_rate == 3e-4


def test_without_a_file_the_overrides_are_all() -> None:
    assert read_settings(None, {"model": "m", "out": "o", "data": {"path": "p"}}).data.path == "p"


@pytest.mark.parametrize(
    ("lora", "r", "lora_alpha"),
    [
        (None, 16, 32),
        ({}, 16, 32),
        ({"r": 3}, 3, 6),
        ({"lora_alpha": 5}, 16, 5),
        ({"r": 7, "lora_alpha": 1}, 7, 1),
        (LoraConfig(r=4), 4, 8),  # a whole LoraConfig has its own, PEFT's defaults
    ],
)
def test_rank_is_16_and_alpha_twice_the_rank_where_not_given(lora: object, r: int, lora_alpha: float) -> None:
    settings = least() if lora is None else least(lora=lora)
    assert (settings.lora.r, settings.lora.lora_alpha, settings.lora.task_type) == (r, lora_alpha, "CAUSAL_LM")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"modle": "base"}, ["unknown key 'modle'", "Did you mean 'model'?"]),
        ({"data": {"path": "p", "promt": "x"}}, ["data", "unknown key 'promt'", "'prompt'"]),
        ({"lora": {"lora_alhpa": 3}}, ["lora", "unknown key 'lora_alhpa'", "'lora_alpha'"]),
        ({"train": {"lerning_rate": 3}}, ["train", "unknown key 'lerning_rate'", "'learning_rate'"]),
        ({"train": {"epochs": 0}, "dtype": "int8"}, ["epochs", "given: 0", "dtype", "given: 'int8'"]),
        ({"train": {"learning_rate": math.inf}}, ["learning_rate", "finite"]),
        ({"train": {"learning_rate": math.nan}}, ["learning_rate"]),
        ({"train": {"betas": [0.9, 1.0]}}, ["betas.1", "less than 1"]),
        ({"train": {"schedule": "cosin"}}, ["schedule", "'cosine'", "given: 'cosin'"]),
        ({"train": {"seed": 2**70}}, ["seed"]),
        ({"train": 5}, ["train"]),
        ({"train": {"patience": 2}, "data": {"path": "p", "eval_fraction": 0}}, ["patience", "eval_path", "eval_fraction"]),
        ({"data": {"path": "p", "prompt": "{{ x }}"}}, ["data.prompt and data.completion belong together"]),
    ],
)
def test_a_fault_is_named_with_a_way_out(values: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        least(**values)
    for word in words:
        assert word in str(error.value)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        RunSettings(out="o", data={"limt": 3}, train={"epochs": 0, "wramup": 0.1})
    for word in ("model", "path", "limt", "epochs", "wramup"):
        assert word in str(error.value)


@pytest.mark.parametrize("r", [0, -2, "many", 2.5])
def test_a_bad_rank_is_told_once_and_not_as_a_bad_alpha(r: object) -> None:
    with pytest.raises(ConfigError) as error:
        least(lora={"r": r})
    assert "has 1 fault(s)" in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("model = \n")
    (tmp_path / "latin.toml").write_bytes(b'model = "\xe9"')
    for path, word in (
        (tmp_path / "absent.toml", "there is no settings file"),
        (tmp_path / "broken.toml", "is not TOML"),
        (tmp_path / "latin.toml", "is not TOML"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=word):
            read_settings(path)


def test_settings_without_a_lora_section_read_back_equal(tmp_path: Path) -> None:
    assert read_back(least(), tmp_path) == least()


def test_a_config_without_a_task_reads_back_equal(tmp_path: Path) -> None:
    settings = least(lora=LoraConfig(r=3, target_modules=".*(q|v)_proj"))
    assert read_back(settings, tmp_path) == settings


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1)
SHARES = st.floats(0, 0.99, allow_nan=False)


@given(
    model=TEXTS,
    path=TEXTS,
    templates=st.none() | TEXTS,
    fraction=SHARES,
    r=st.integers(1, 500),
    modules=TEXTS | st.lists(TEXTS, min_size=1),
    pattern=st.dictionaries(st.from_regex(r"\A[a-z_.]+\Z"), st.integers(1, 99)),
    rate=st.floats(1e-30, 1e30, exclude_min=True),
    betas=st.tuples(SHARES, SHARES),
    every=st.none() | st.integers(1, 10**9),
)
def test_settings_read_back_equal_from_their_toml(
    tmp_path_factory: pytest.TempPathFactory,
    model: str,
    path: str,
    templates: str | None,
    fraction: float,
    r: int,
    modules: object,
    pattern: dict[str, int],
    rate: float,
    betas: tuple[float, float],
    every: int | None,
) -> None:
    try:
        lora = LoraConfig(r=r, target_modules=modules, rank_pattern=pattern)
    except ConfigError:  # the text is no regular expression
        lora = LoraConfig(r=r, rank_pattern=pattern)
    settings = least(
        model=model,
        data={"path": path, "prompt": templates, "completion": templates, "eval_fraction": fraction},
        lora=lora,
        train={"learning_rate": rate, "betas": betas, "eval_every": every},
    )
    back = read_back(settings, tmp_path_factory.mktemp("toml"))
    assert back == settings
    assert back.digest() == settings.digest()


def read_back(settings: RunSettings, folder: Path) -> RunSettings:
    (folder / "config.toml").write_text(settings.to_toml())
    return read_settings(folder / "config.toml")


@pytest.mark.parametrize("source", [{"command": "sh -c 'touch was-here'"}, {"function": "judge.py:score"}])
def test_a_recipe_does_not_bring_code_along(source: dict[str, str]) -> None:
    made = RunSettings(
        model="m", out="o", data={"path": "rows.jsonl"}, objective={"kind": "grpo", "rewards": [source]}, lora={"r": 4}
    )
    with pytest.raises(ConfigError, match="run code of whoever wrote it"):
        settings_of_recipe(made.model_dump(mode="json"), model="other", out="there")


def test_a_run_that_was_begun_before_there_were_objectives_can_go_on() -> None:
    settings = RunSettings(model="m", out="o", data={"path": "rows.jsonl"})
    # As the version without objectives had it for the same settings.
    assert settings.digest() == "3c653cda9e726ba75c17a25779277575f036fcdc3bd0b4e180879979c2abe3c5"
    assert settings.changed(objective={}).digest() == settings.digest()


def test_the_digest_sees_what_decides_the_numbers_and_not_where_files_lie() -> None:
    first = least()
    assert first.digest() == least(model="moved/base", out="elsewhere", data={"path": "moved/rows.jsonl"}).digest()
    for other in (least(train={"seed": 1}), least(lora={"r": 8}), least(data={"path": "rows.jsonl", "system": "Be brief."})):
        assert other.digest() != first.digest()
