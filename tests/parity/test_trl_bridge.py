"""TRL's own trainers on our layers: what they save, resume and measure against, and that they load no second model.

The oracle of the reference is a second model, loaded on purpose and given to TRL as such.
"""

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_run import WORDS, count_language_models, rows, save_tiny_model
from torch import nn

pytest.importorskip("trl")

from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from luthier.adapt.attaching import attach
from luthier.adapt.merging import merge
from luthier.adapt.packing import quantize_linears
from luthier.adapt.state import adapter_parameters
from luthier.core.config import LoraConfig
from luthier.core.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterStateError,
    BaseMismatchError,
    ConfigError,
    TargetError,
)
from luthier.formats.adapters import adapter_tensors, load_adapter, save_adapter
from luthier.models.load import load_model
from luthier.train.trl_bridge import TESTED_TRL, TrlModel, check_version, for_trl

# TRL, datasets and accelerate warn about their own futures.
pytestmark = pytest.mark.filterwarnings("ignore")

LORA = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.1}
PLAIN = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
IDS = torch.arange(3, 30).unsqueeze(0)


@pytest.fixture(scope="module")
def base(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny base; GRPO's answers are short, since its vocabulary is."""
    return save_tiny_model(tmp_path_factory.mktemp("trl") / "base", tiny_llama, tiny_tokenizer, hidden=32, layers=1)


def model_of(base: Path) -> nn.Module:
    return load_model(str(base), dtype="float32").model


def chats(count: int = 12, start: int = 0) -> Dataset:
    return Dataset.from_list([{"messages": row["messages"][1:]} for row in rows(count, start=start)])


def pairs(count: int = 8) -> Dataset:
    found = []
    for row in rows(count):
        _, asked, answered = row["messages"]
        other = {"role": "assistant", "content": "no " + WORDS[len(found)]}
        found.append({"prompt": [asked], "chosen": [answered], "rejected": [other]})
    return Dataset.from_list(found)


def sft(model: Any, tokenizer: Any, out: Path, **settings: Any) -> SFTTrainer:
    values = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.02}
    config = SFTConfig(str(out), **(PLAIN | values | settings))
    torch.manual_seed(5)
    return SFTTrainer(model, config, train_dataset=chats(), eval_dataset=chats(4, 40), processing_class=tokenizer)


def dpo(model: Any, tokenizer: Any, out: Path, reference: Any = None, **settings: Any) -> DPOTrainer:
    values = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.01, "beta": 0.3}
    config = DPOConfig(str(out), **(PLAIN | values | {"save_strategy": "no"} | settings))
    torch.manual_seed(5)
    return DPOTrainer(model, reference, config, train_dataset=pairs(), processing_class=tokenizer)


def logged(trainer: Any, *keys: str) -> list[list[float]]:
    return [[record[key] for record in trainer.state.log_history if key in record] for key in keys]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def trained(base: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrlModel, Path, SFTTrainer]:
    """Return a model that TRL trained for six steps, the folder of its checkpoints, and the trainer."""
    out = tmp_path_factory.mktemp("sft") / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = for_trl(model_of(base), LoraConfig(**LORA))
        trainer = sft(model, tiny_tokenizer, out)
        trainer.train()
    return model, out, trainer


def test_sft_trains_the_adapter_and_writes_nothing_else(trained: Any, base: Path) -> None:
    model, out, trainer = trained
    (losses,) = logged(trainer, "loss")
    assert len(losses) == 6 and losses[-1] < losses[0]
    fresh = dict(model_of(base).named_parameters())
    own = dict(model.get_base_model().named_parameters())
    assert all(torch.equal(own[name], weight) for name, weight in fresh.items())
    for step in (3, 6):
        folder = out / f"checkpoint-{step}"
        assert (folder / "adapter_model.safetensors").is_file() and (folder / "adapter_config.json").is_file()
        assert not list(folder.glob("**/model*.safetensors")) and not list(folder.glob("pytorch_model*"))
    stored = load_file(out / "checkpoint-6/adapter_model.safetensors")
    assert all(torch.equal(stored[key], tensor) for key, tensor in adapter_tensors(model.get_base_model()).items())
    note = json.loads((out / "checkpoint-6/luthier.json").read_text())
    assert note["recipe"]["trainer"].startswith("trl ")


def test_a_checkpoint_is_an_adapter_for_peft_and_for_luthier(trained: Any, base: Path) -> None:
    model, out, _ = trained
    wanted = logits(model)
    again = model_of(base)
    load_adapter(again, out / "checkpoint-6")
    assert torch.equal(logits(again), wanted)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(out / "checkpoint-6"))
    assert (logits(peft) - wanted).abs().max() < 1e-5
    assert (logits(model_of(base)) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["norm"]}])
def test_a_resumed_run_ends_with_the_same_bits(base: Path, tiny_tokenizer: Any, tmp_path: Path, kind: dict[str, Any]) -> None:
    config = LoraConfig(**LORA | kind)
    whole = for_trl(model_of(base), config)
    began = {key: tensor.clone() for key, tensor in adapter_tensors(whole.get_base_model()).items()}
    sft(whole, tiny_tokenizer, tmp_path / "run").train()
    torch.manual_seed(99)
    again = for_trl(model_of(base), config)
    sft(again, tiny_tokenizer, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    ended, resumed = (adapter_tensors(model.get_base_model()) for model in (whole, again))
    assert all(torch.equal(resumed[key], tensor) for key, tensor in ended.items())
    assert not any(torch.equal(began[key], tensor) for key, tensor in ended.items() if "norm" not in key)


def test_the_best_checkpoint_is_put_back(base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = for_trl(model_of(base), LoraConfig(**LORA))
    settings = {"max_steps": 8, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "load_best_model_at_end": True}
    # The worst counts as the best here, so that it is not the last one.
    trainer = sft(model, tiny_tokenizer, tmp_path / "run", greater_is_better=True, metric_for_best_model="eval_loss", **settings)
    trainer.train()
    losses = {record["step"]: record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record}
    best = max(losses, key=lambda step: losses[step])
    assert best < 8
    stored = load_file(tmp_path / f"run/checkpoint-{best}/adapter_model.safetensors")
    assert all(torch.equal(stored[key], tensor) for key, tensor in adapter_tensors(model.get_base_model()).items())


def test_a_checkpoint_of_another_adapter_or_base_is_refused(
    trained: Any, base: Path, tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    _, out, _ = trained
    with pytest.raises(AdapterMismatchError, match="r is 3, needs 4"):
        for_trl(model_of(base), LoraConfig(**LORA | {"r": 4})).load_adapter(out / "checkpoint-3", "default")
    with pytest.raises(AdapterMismatchError, match="is not expected"):
        for_trl(model_of(base), LoraConfig(**LORA, target_modules=["q_proj"])).load_adapter(out / "checkpoint-3", "default")
    other = save_tiny_model(tmp_path / "other", tiny_llama, tiny_tokenizer, hidden=32, layers=1, seed=4)
    with pytest.raises(BaseMismatchError):
        for_trl(model_of(other), LoraConfig(**LORA)).load_adapter(out / "checkpoint-3", "default")
    pissa = for_trl(model_of(base), LoraConfig(r=3, init_lora_weights="pissa"))
    plain = save_adapter(pissa.get_base_model(), tmp_path / "plain")
    with pytest.raises(AdapterFormatError, match="from which they cannot go on being trained"):
        pissa.load_adapter(plain, "default")


def test_dpo_measures_against_the_base_without_a_second_one(base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    keys = ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected")
    torch.manual_seed(1)
    before = count_language_models()
    shared = dpo(for_trl(model_of(base), LoraConfig(**LORA)), tiny_tokenizer, tmp_path / "shared")
    assert shared.ref_model is None
    assert count_language_models() == before + 1
    shared.train()
    torch.manual_seed(1)
    apart = dpo(for_trl(model_of(base), LoraConfig(**LORA)), tiny_tokenizer, tmp_path / "apart", model_of(base))
    assert apart.ref_model is not None
    apart.train()
    ours, theirs = logged(shared, *keys), logged(apart, *keys)
    assert len(ours[0]) == 4 and ours[0][-1] != pytest.approx(ours[0][0], abs=1e-3)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(wanted, abs=1e-5)


def test_dpo_on_a_continued_adapter_measures_against_its_frozen_copy(
    trained: Any, base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    _, out, _ = trained
    model = for_trl(model_of(base), adapter=out / "checkpoint-6")
    start = {key: tensor.clone() for key, tensor in adapter_tensors(model.get_base_model()).items()}
    shared = dpo(model, tiny_tokenizer, tmp_path / "shared", save_strategy="steps", save_steps=2)
    shared.train()
    frozen = adapter_tensors(model.get_base_model(), "ref")
    assert all(torch.equal(frozen[key], tensor) for key, tensor in start.items())
    assert not any(item.parameter.requires_grad for item in adapter_parameters(model.get_base_model(), "ref"))
    apart_base = model_of(base)
    load_adapter(apart_base, out / "checkpoint-6")
    merge(apart_base)
    apart = dpo(for_trl(model_of(base), adapter=out / "checkpoint-6"), tiny_tokenizer, tmp_path / "apart", apart_base)
    apart.train()
    ours, theirs = (logged(trainer, "loss", "rewards/margins") for trainer in (shared, apart))
    assert ours[0][0] == pytest.approx(0.693147, abs=1e-4)  # the policy is its own reference before the first step
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(wanted, abs=1e-4)
    assert (tmp_path / "shared/checkpoint-2/ref/adapter_model.safetensors").is_file()

    again = for_trl(model_of(base), adapter=out / "checkpoint-6")
    resumed = dpo(again, tiny_tokenizer, tmp_path / "shared", save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "shared/checkpoint-2"))
    ended, found = (adapter_tensors(each.get_base_model()) for each in (model, again))
    assert all(torch.equal(found[key], tensor) for key, tensor in ended.items())


def test_grpo_with_a_reference_loads_no_second_model(base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    def shortness(completions: list[Any], **others: Any) -> list[float]:
        return [-float(len(completion[0]["content"])) for completion in completions]

    values = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4, "beta": 0.2}
    values |= {"max_completion_length": 8, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 3}
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in pairs()])
    model = for_trl(model_of(base), LoraConfig(r=3))
    before = count_language_models()
    config = GRPOConfig(str(tmp_path / "run"), **(PLAIN | values))
    trainer = GRPOTrainer(model, [shortness], config, train_dataset=prompts, processing_class=tiny_tokenizer)
    assert trainer.ref_model is None
    began = {key: tensor.clone() for key, tensor in adapter_tensors(model.get_base_model()).items()}
    trainer.train()
    assert count_language_models() == before
    (divergences,) = logged(trainer, "kl")
    assert divergences[0] == pytest.approx(0.0, abs=1e-6)
    assert divergences[-1] > 1e-6
    ended = adapter_tensors(model.get_base_model())
    assert any(not torch.equal(began[key], tensor) for key, tensor in ended.items())
    frozen = adapter_tensors(model.get_base_model(), "ref")
    assert all(torch.equal(frozen[key], tensor) for key, tensor in began.items())
    stored = load_file(tmp_path / "run/checkpoint-3/adapter_model.safetensors")
    assert all(torch.equal(stored[key], tensor) for key, tensor in ended.items())
    with pytest.raises(AdapterStateError, match="use_vllm"):
        model.merge_adapter()


def test_a_base_in_4_bits_is_trained_over_with_adapters_in_float32(base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    packed = model_of(base)
    quantize_linears(packed)
    model = for_trl(packed, LoraConfig(r=3))
    trainer = sft(model, tiny_tokenizer, tmp_path / "run", max_steps=2)
    trainer.train()
    parameters = [item.parameter for item in adapter_parameters(packed)]
    assert all(parameter.dtype is torch.float32 for parameter in parameters)
    assert all(item.parameter.any() for item in adapter_parameters(packed) if item.role == "lora_B")
    again = model_of(base)
    quantize_linears(again)
    load_adapter(again, tmp_path / "run/checkpoint-2")
    assert torch.equal(logits(again), logits(packed))


def test_the_settings_that_trl_has_by_default_work(base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = for_trl(model_of(base), LoraConfig(**LORA))
    own = {"bf16": None, "gradient_checkpointing": True, "packing": True, "max_length": 64, "max_steps": 2}
    trainer = sft(model, tiny_tokenizer, tmp_path / "run", **own)
    assert trainer.args.bf16  # in autocast, on the CPU too
    trainer.train()
    assert all(item.parameter.any() for item in adapter_parameters(model.get_base_model()) if item.role == "lora_B")


@pytest.mark.parametrize("lora", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_on_the_output_layer_is_refused(base: Path, lora: dict[str, Any]) -> None:
    model = model_of(base)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(TargetError, match="what an adapter adds to lm_head would never be trained"):
        for_trl(model, LoraConfig(r=3, **lora))
    assert [name for name, _ in model.named_parameters()] == names  # taken out again


def test_what_cannot_be_bridged_is_refused(base: Path, tmp_path: Path) -> None:
    from luthier.core.config import AdaLoraConfig

    with pytest.raises(ConfigError, match="AdaLoRA moves ranks after every step"):
        for_trl(model_of(base), AdaLoraConfig())
    with pytest.raises(ConfigError, match="give either the config of a fresh adapter, or the folder"):
        for_trl(model_of(base), LoraConfig(), adapter=tmp_path)
    with pytest.raises(AdapterStateError, match="no adapter is attached"):
        for_trl(model_of(base))


def test_an_adapter_that_is_there_is_taken_and_a_reference_made_anew(base: Path) -> None:
    inner = model_of(base)
    attach(inner, LoraConfig(r=3, init_lora_weights=False))
    model = for_trl(inner)
    assert isinstance(model, PeftModel) and model.active_adapters == ["default"]
    model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        for item in adapter_parameters(inner):
            item.parameter.add_(1.0)
    model.add_adapter("ref", model.peft_config["default"])
    now, kept = adapter_tensors(inner), adapter_tensors(inner, "ref")
    assert all(torch.equal(kept[key], tensor) for key, tensor in now.items())
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(model_of(base)))
    assert model.peft_config["ref"].r == 3


def test_the_configuration_is_pefts_own(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig as PeftLora

    config = LoraConfig(**LORA, use_rslora=True, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "v_proj"])
    model = for_trl(model_of(base), config)
    found = model.peft_config["default"]
    assert isinstance(found, PeftLora)
    assert (found.r, found.use_rslora, found.rank_pattern, set(found.target_modules)) == (
        3,
        True,
        {"q_proj": 2},
        {"q_proj", "v_proj"},
    )
    trained, everything = model.get_nb_trainable_parameters()
    assert trained == sum(item.parameter.numel() for item in adapter_parameters(model.get_base_model()))
    assert everything > trained


def test_versions_of_trl_are_told_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    check_version(f"{TESTED_TRL}.3")
    assert not caplog.records
    check_version("1.17.0.dev0")
    check_version("1.2")
    assert ["newer" in record.message for record in caplog.records] == [True, False]
    for found in ("0.24.0", "2.0.0"):
        with pytest.raises(ConfigError, match=rf"TRL {found} is installed, and the bridge is for TRL 1\.x"):
            check_version(found)


def test_the_installed_trl_is_the_tested_one() -> None:
    import trl

    assert trl.__version__.startswith(f"{TESTED_TRL}.")


def test_telemetry_is_switched_off_where_nobody_did(base: Path) -> None:
    """In a process that is told nothing: TRL's ping ends before it is put into the queue of those to send."""
    program = (
        "import logging, os, sys; logging.basicConfig(level='INFO', stream=sys.stdout)\n"
        "from huggingface_hub import constants\n"
        "from huggingface_hub.utils import _telemetry\n"
        "assert not constants.HF_HUB_DISABLE_TELEMETRY and not constants.is_offline_mode()\n"
        "from luthier.core.config import LoraConfig\n"
        "from luthier.models.load import load_model\n"
        "from luthier.train.trl_bridge import for_trl\n"
        f"for_trl(load_model({str(base)!r}, dtype='float32'), LoraConfig(r=2))\n"
        "_telemetry.send_telemetry('trl/SFTTrainer', library_name='trl')\n"
        "assert _telemetry._TELEMETRY_QUEUE.empty() and _telemetry._TELEMETRY_THREAD is None\n"
        "assert os.environ['HF_HUB_DISABLE_TELEMETRY'] == '1'\n"
    )
    hidden = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "TRANSFORMERS_OFFLINE")
    import os

    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "telemetry that TRL's trainers send at their start is switched off" in done.stdout
    logging.getLogger(__name__).debug(done.stdout)
