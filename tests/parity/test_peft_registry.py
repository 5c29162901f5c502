"""A folder that PEFT itself wrote is let into the registry, with the numbers that PEFT knows of it."""

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from tests.parity.cases import MakeModel

from luthier.registry.place import open_registry
from luthier.registry.registering import register
from luthier.registry.versions import find_version


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_folder_that_peft_wrote_is_a_version(tmp_path: Path, tiny_llama: MakeModel) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path / "peft")
    registry = open_registry(tmp_path / "registry", create=True)
    register(registry, tmp_path / "peft", name="orders", actor="ann", owner="team", no_data_reason="a test")
    with registry.database.reading() as session:
        version = find_version(session, "orders")
        trained = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
        assert (version.rank, version.alpha, version.num_parameters) == (3, 6.0, trained)
        assert version.target_modules == ["q_proj", "v_proj"]
    registry.database.engine.dispose()
