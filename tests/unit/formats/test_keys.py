"""The names of tensors on disk, in the forms that circulate."""

import pytest

from luthier.core.errors import AdapterFormatError
from luthier.formats.keys import canonical_keys, pair_key, whole_key

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("found", "canonical"),
    [
        (f"{Q}.lora_A.weight", f"{Q}.lora_A.weight"),
        (f"{Q}.lora_B.default.weight", f"{Q}.lora_B.weight"),
        (f"{Q}.lora_A.sql-v3.weight", f"{Q}.lora_A.weight"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", f"{Q}.lora_A.weight"),
        ("base_model.model.wte.lora_embedding_A", "base_model.model.wte.lora_embedding_A"),
        ("base_model.model.wte.lora_embedding_B.default", "base_model.model.wte.lora_embedding_B"),
        (f"{Q}.lora_magnitude_vector", f"{Q}.lora_magnitude_vector"),
        (f"{Q}.lora_magnitude_vector.weight", f"{Q}.lora_magnitude_vector"),
        (f"{Q}.lora_magnitude_vector.sql-v3", f"{Q}.lora_magnitude_vector"),
        (f"{Q}.lora_magnitude_vector.sql-v3.weight", f"{Q}.lora_magnitude_vector"),
        ("base_model.model.score.weight", "base_model.model.score.weight"),
        (f"{Q}.base_layer.bias", f"{Q}.base_layer.bias"),
    ],
)
def test_a_key_as_peft_writes_it_today(found: str, canonical: str) -> None:
    assert canonical_keys([found]) == {found: canonical}


def test_the_prefix_is_not_put_before_some_keys_only() -> None:
    assert canonical_keys([f"{Q}.lora_A.weight", "stray"])["stray"] == "stray"


def test_two_adapters_in_one_file_are_refused() -> None:
    with pytest.raises(AdapterFormatError, match="more than one adapter"):
        canonical_keys([f"{Q}.lora_A.one.weight", f"{Q}.lora_A.two.weight", f"{Q}.lora_B.one.weight"])


def test_keys_by_kind_of_layer() -> None:
    assert pair_key("a.b", "lora_A", "linear") == "base_model.model.a.b.lora_A.weight"
    assert pair_key("a.b", "lora_B", "conv1d") == "base_model.model.a.b.lora_B.weight"
    assert pair_key("a.b", "lora_B", "embedding") == "base_model.model.a.b.lora_embedding_B"
    assert pair_key("a.b", "bias", "linear") == "base_model.model.a.b.base_layer.bias"
    for word in ("linear", "conv1d", "embedding"):
        assert pair_key("a.b", "magnitude", word) == "base_model.model.a.b.lora_magnitude_vector"
    assert whole_key("norm", "weight") == "base_model.model.norm.weight"
