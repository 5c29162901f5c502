"""The policy file: what it may say, and what its digest depends on."""

import pytest

from luthier.core.errors import ConfigError
from luthier.evaluate import DEFAULT_POLICY, Policy, read_policy


def test_a_policy_survives_its_file(tmp_path):
    strict = Policy(
        name="strict", version=3, deltas={"grammar": 0.03}, suites=("grammar",), floors=({"suite": "a", "minimum": 0.9},)
    )
    (tmp_path / "strict.toml").write_text(strict.to_toml())
    again = read_policy(tmp_path / "strict.toml")
    assert again == strict and again.digest() == strict.digest()


def test_a_file_says_only_what_is_to_be_otherwise(tmp_path):
    (tmp_path / "p.toml").write_text('name = "loose"\n[task]\nagainst_base = "no worse"\n')
    policy = read_policy(tmp_path / "p.toml")
    assert policy.task.against_base == "no worse"
    assert policy.changed(name="default", task=DEFAULT_POLICY.task) == DEFAULT_POLICY


@pytest.mark.parametrize("change", [{"alpha": 0.04}, {"version": 2}, {"name": "x"}, {"floors": ()}, {"seed": 1}])
def test_every_change_of_a_policy_changes_its_digest(change):
    assert DEFAULT_POLICY.changed(**change).digest() != DEFAULT_POLICY.digest()


def test_all_faults_of_a_file_are_told_at_once(tmp_path):
    (tmp_path / "p.toml").write_text("aplha = 0.1\nmin_drop = 2\n[drift]\nwarn = 0.3\n[[floors]]\nminimum = 0.9\n")
    with pytest.raises(ConfigError) as caught:
        read_policy(tmp_path / "p.toml")
    for words in ("4 fault(s)", "Did you mean 'alpha'", "min_drop", "warn = 0.3 is above fail = 0.15", "exactly one of the two"):
        assert words in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("alpha = 0.01", "a name of its own"), ("alpha =", "not TOML"), (None, "there is no policy file")]
)
def test_files_that_are_no_policy_are_refused(tmp_path, text, words):
    path = tmp_path / "p.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_policy(path)
