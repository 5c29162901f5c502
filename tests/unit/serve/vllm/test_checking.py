"""What of an adapter vLLM would serve wrongly. The folders are PEFT's and luthier's own; the base is a real model's folder."""

import json

import pytest
from tests.engine_scene import save_peft_adapter
from tests.served_adapters import put_nan, save_random_adapter
from tests.unfit_adapters import KINDS, MAX_RANK, QV, UNSOUND

from luthier.adapt import detach
from luthier.core.errors import AdapterFormatError, ModelError
from luthier.formats.adapters import fingerprint_of
from luthier.serve.vllm.checking import RANKS, Served, check_for_vllm, size_for


def test_the_base_is_described_as_the_live_model_is(base_model, served):
    assert served.fingerprint == fingerprint_of(base_model).model_dump()
    assert served.layers["model.layers.1.self_attn.k_proj"] == (24, 48)
    assert served.layers["model.layers.0.mlp.down_proj"] == (48, 123)
    assert len(served.layers) == 14 and "lm_head" not in served.layers


def test_what_is_known_of_the_base_travels_as_a_file(served, tmp_path):
    served.write(tmp_path / "base.json")
    assert Served.read(tmp_path / "base.json") == served
    (tmp_path / "base.json").write_text('{"layers": 3}')
    with pytest.raises(ModelError, match="does not describe a served base"):
        Served.read(tmp_path / "base.json")


@pytest.mark.parametrize(
    "config",
    [
        {"r": 8, "lora_alpha": 16},
        {"r": MAX_RANK, "use_rslora": True},
        {"r": 2, "rank_pattern": {"v_proj": 7}, "alpha_pattern": {"q_proj": 9}, "target_modules": QV},
        {"r": 3, "target_modules": ["down_proj"], "layers_to_transform": [1]},
    ],
    ids=["plain", "rslora", "patterns", "one block"],
)
def test_what_vllm_serves_right_has_no_reason_against_it(base_model, served, tmp_path, config):
    assert check_for_vllm(save_peft_adapter(base_model, tmp_path / "fit", 3, **config), served, MAX_RANK) == []


def test_an_adapter_written_by_luthier_is_fit(base_model, served, tmp_path):
    folder = save_random_adapter(tmp_path / "fit", base_model)
    detach(base_model)
    assert check_for_vllm(folder, served, MAX_RANK) == []


@pytest.mark.parametrize("kind", [*KINDS, *UNSOUND])
def test_what_vllm_would_serve_wrongly_is_refused_with_the_reason(kind, unfit, served):
    folder, words = unfit[kind]
    reasons = check_for_vllm(folder, served, MAX_RANK)
    assert any(words in reason for reason in reasons), reasons


def test_the_kinds_above_are_all_kinds(unfit):
    assert sorted(unfit) == sorted([*KINDS, *UNSOUND])


def test_all_reasons_are_told_at_once(base_model, served, tmp_path):
    folder = save_peft_adapter(base_model, tmp_path / "bad", 3, r=20, use_dora=True, bias="all")
    assert len(check_for_vllm(folder, served, MAX_RANK)) >= 3


def test_the_registrys_fingerprint_counts_where_the_folder_has_none(tiny_llama, base_model, served, tmp_path):
    folder = save_peft_adapter(base_model, tmp_path / "foreign", 3, r=4)
    elsewhere = fingerprint_of(tiny_llama(seed=5)).model_dump()
    assert check_for_vllm(folder, served, MAX_RANK, trained_on=served.fingerprint) == []
    (reason,) = check_for_vllm(folder, served, MAX_RANK, trained_on=elsewhere)
    assert "another base" in reason


def test_a_loftq_adapter_is_for_its_own_base_only(base_model, served, tmp_path):
    folder = save_random_adapter(tmp_path / "fitted", base_model)
    detach(base_model)
    note = json.loads((folder / "luthier.json").read_text())
    (folder / "luthier.json").write_text(json.dumps({**note, "recipe": {"loftq": {}}, "base": {}}))
    (reason,) = check_for_vllm(folder, served, MAX_RANK)
    assert "loftq" in reason


def test_poisoned_numbers_are_an_error(base_model, served, tmp_path):
    folder = save_peft_adapter(base_model, tmp_path / "poisoned", 3, r=4)
    put_nan(folder)
    with pytest.raises(AdapterFormatError, match="NaN"):
        check_for_vllm(folder, served, MAX_RANK)


def test_the_smallest_size_that_holds_all_ranks():
    assert [size_for(iter([rank])) for rank in (1, 2, 8, 9, 65, 300, 512)] == [1, 8, 8, 16, 128, 320, 512]
    assert size_for(iter([])) == 1
    assert size_for(iter([4, 9000])) == 8
    assert all(size_for(iter([size])) == size for size in RANKS)
