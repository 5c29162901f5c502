"""The error tree, near misses, and lazy names."""

import inspect

import pytest

from luthier.core import errors
from luthier.core.lazy import lazy_names

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


def test_every_error_is_in_the_tree_that_the_file_opens_with() -> None:
    assert len(KINDS) > 10
    for kind in KINDS:
        assert issubclass(kind, errors.LuthierError)
        assert kind.__name__ in (errors.__doc__ or "")


def test_every_error_is_also_a_standard_one() -> None:
    standard = (ValueError, RuntimeError, OSError, ImportError)
    assert [kind for kind in KINDS if kind is not errors.LuthierError and not issubclass(kind, standard)] == []


def test_a_missing_extra_says_how_to_install_it() -> None:
    error = errors.MissingExtraError("gguf", "gguf", "reading GGUF files")
    assert "reading GGUF files needs the package 'gguf'" in str(error)
    assert "pip install 'luthier[gguf]'" in str(error)


def test_near_misses_best_first() -> None:
    assert errors.near_misses("q_prj", ["k_proj", "q_proj", "lm_head"])[0] == "q_proj"
    assert errors.did_you_mean("q_prj", ["q_proj"]) == " Did you mean 'q_proj'?"
    assert errors.did_you_mean("zzz", ["q_proj"]) == ""


def test_lazy_names_load_at_first_use_and_miss_clearly() -> None:
    load, names = lazy_names("somewhere", {"b": "json", "loads": "json"})
    assert names == ["b", "loads"]
    assert load("loads")("[1]") == [1]  # type: ignore[operator]
    with pytest.raises(AttributeError, match="'somewhere' has no attribute 'nothing'"):
        load("nothing")
