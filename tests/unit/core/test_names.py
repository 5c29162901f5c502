"""Name matching against a reference that compares lists of path segments, and against PEFT's own function; adapter names."""

import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterNameError
from luthier.core.names import (
    block_index,
    check_adapter_name,
    is_inside_saved,
    is_saved_whole,
    is_target,
    matches_any,
    matches_name,
    pattern_value,
    patterns_of,
)

WORDS = ["q_proj", "proj", "k_proj", "mlp", "h", "layers", "experts", "0", "1", "12"]
paths = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(".".join)
names = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(".".join)
lists = st.lists(names, min_size=1, max_size=3)


def ends_with(path: str, name: str) -> bool:
    """Tell whether the last segments of the path are the name's: a whole word at a time."""
    have, want = path.split("."), name.split(".")
    return have[-len(want) :] == want


@given(paths, names)
def test_a_name_matches_whole_segments_at_the_end(path: str, name: str) -> None:
    assert matches_name(name, path) is ends_with(path, name)


@given(paths, lists)
def test_a_list_matches_where_any_name_does(path: str, entries: list[str]) -> None:
    assert matches_any(entries, path) is any(ends_with(path, name) for name in entries)


@given(paths, lists, lists)
def test_an_excluded_path_is_no_target(path: str, targets: list[str], excluded: list[str]) -> None:
    config = LoraConfig(target_modules=targets, exclude_modules=excluded)
    wanted = any(ends_with(path, name) for name in targets) and not any(ends_with(path, name) for name in excluded)
    assert is_target(config, path) is wanted


@given(paths, lists)
def test_what_lies_in_a_saved_module_is_no_target(path: str, saved: list[str]) -> None:
    config = LoraConfig(target_modules=[path], modules_to_save=saved)
    segments = path.split(".")
    heads = [".".join(segments[: end + 1]) for end in range(len(segments))]
    inside = any(ends_with(head, name) for head in heads for name in saved)
    assert is_inside_saved(config, path) is inside
    assert is_target(config, path) is not inside


@given(
    path=paths,
    targets=st.one_of(lists, st.sampled_from([r".*\.(q|k)_proj", r"layers\.\d+.*", "q_proj", r".*1.*"])),
    excluded=st.one_of(st.none(), lists, st.just(r".*experts.*")),
    saved=st.one_of(st.none(), lists),
    chosen=st.one_of(st.none(), st.integers(0, 12), st.lists(st.integers(0, 12), max_size=3)),
    pattern=st.one_of(st.none(), st.just("layers"), st.lists(st.sampled_from(["h", "layers"]), min_size=1)),
)
def test_targets_are_those_of_peft(path, targets, excluded, saved, chosen, pattern) -> None:
    peft = pytest.importorskip("peft.tuners.tuners_utils")
    if isinstance(targets, str) or chosen is None:
        chosen = pattern = None
    settings = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "modules_to_save": saved,
        "layers_to_transform": chosen,
        "layers_pattern": pattern,
    }
    theirs = types.SimpleNamespace(**settings, target_parameters=None)
    # PEFT answers with a match, a boolean, or an object that is false and stands for "excluded".
    assert is_target(LoraConfig(**settings), path) is bool(peft.check_target_module_exists(theirs, path))


@pytest.mark.parametrize(
    ("path", "pattern", "index"),
    [
        ("model.layers.3.self_attn.q_proj", None, 3),
        ("model.layers.1.experts.0.up", None, 1),
        ("model.layers.12.mlp", None, 12),
        ("model.layers.12.mlp", "layers", 12),
        ("transformer.h.7.attn", ["layers", "h"], 7),
        ("transformer.h.7.attn", "layers", None),
        ("lm_head", None, None),
        ("model.layers.3", None, None),  # the block itself is not in a block
    ],
)
def test_block_index(path: str, pattern: str | list[str] | None, index: int | None) -> None:
    assert block_index(path, pattern) == index


def test_the_first_pattern_wins_and_matches_at_a_segment() -> None:
    patterns = {r"layers\.0\..*": 1, "q_proj": 2}
    assert pattern_value(patterns, "model.layers.0.q_proj", 9) == 1
    assert pattern_value(patterns, "model.layers.1.q_proj", 9) == 2
    assert pattern_value(patterns, "model.layers.1.xq_proj", 9) == 9
    assert pattern_value({}, "q_proj", 9) == 9


def test_saved_modules_match_by_their_ending_as_in_peft() -> None:
    config = LoraConfig(modules_to_save=["head"])
    assert is_saved_whole(config, "model.lm_head")
    assert not is_saved_whole(config, "model.heads")


@pytest.mark.parametrize("name", ["default", "sql-v3", "A_1", "7", "x" * 128, "-"])
def test_plain_adapter_names_are_good(name: str) -> None:
    check_adapter_name(name, taken=["layers", "weight"])


@pytest.mark.parametrize("name", ["", "../x", "..", ".", "a/b", "a.b", "a b", "x" * 129, "größe", "模型", "a\n", "a\0", "é"])
def test_names_that_are_no_folder_or_key_are_refused(name: str) -> None:
    with pytest.raises(AdapterNameError, match="1 to 128"):
        check_adapter_name(name)


@pytest.mark.parametrize("name", ["lora", "lora_A", "base_layer", "modules_to_save"])
def test_words_of_pefts_tensor_names_are_refused(name: str) -> None:
    with pytest.raises(AdapterNameError, match=f"'{name}-adapter'"):
        check_adapter_name(name)


def test_names_of_the_models_own_parts_are_refused() -> None:
    with pytest.raises(AdapterNameError, match="'layers-adapter'"):
        check_adapter_name("layers", taken=["layers"])


@given(st.text(max_size=8))
def test_any_accepted_name_is_one_safe_path_part(name: str) -> None:
    try:
        check_adapter_name(name)
    except AdapterNameError:
        return
    assert name
    assert name.isascii()
    assert all(character.isalnum() or character in "_-" for character in name)


def test_patterns_give_each_path_its_value() -> None:
    assert patterns_of({"a.q": 4, "a.v": 2, "b.q": 4}, 4) == {"a.v": 2}
    assert patterns_of({"a.q": 4, "a.v": 4}, 4) == {}
    # "proj" alone would match "out.proj" too, which has the default.
    for values in ({"proj": 2, "out.proj": 4}, {"proj": 2, "out.proj": 3}, {"out.proj": 3, "proj": 4}):
        patterns = patterns_of(values, 4)
        assert {path: pattern_value(patterns, path, 4) for path in values} == values
