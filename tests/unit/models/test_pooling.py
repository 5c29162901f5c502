"""How a folder says that it pools, in the two forms that sentence-transformers has written."""

import json

import pytest

from luthier.core.errors import ModelError
from luthier.models.pooling import Pooling, read_pooling

STEPS = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def written(folder, config, steps=STEPS):
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text(json.dumps(steps))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, "last"),
        ({"pooling_mode_cls_token": True}, "first"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_the_kinds_that_are_known(tmp_path, config, kind):
    assert read_pooling(written(tmp_path, config)) == Pooling(kind, normalize=True)


def test_vectors_keep_their_length_where_no_step_says_otherwise(tmp_path):
    assert read_pooling(written(tmp_path, {"pooling_mode": "mean"}, STEPS[:2])) == Pooling("mean", normalize=False)


@pytest.mark.parametrize(
    ("config", "steps", "told"),
    [
        ({"pooling_mode_max_tokens": True}, STEPS, "max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, STEPS, "one of them"),
        ({}, STEPS, "nothing"),
        ([], STEPS, "no object"),
        ({"pooling_mode": "mean"}, [*STEPS[:2], STEPS[2] | {"type": "sentence_transformers.models.Dense"}], "Dense"),
        ({"pooling_mode": "mean"}, {"0": STEPS[0]}, "no list"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, config, steps, told):
    with pytest.raises(ModelError, match=told):
        read_pooling(written(tmp_path, config, steps))


def test_a_folder_without_the_files_says_so(tmp_path):
    with pytest.raises(ModelError, match=r"no modules\.json"):
        read_pooling(tmp_path)
