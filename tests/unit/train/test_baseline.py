"""The full fine-tune of the baseline is the one that plain torch makes, and a comparison compares what it says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_run import save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from luthier.adapt import quantize_linears
from luthier.core.errors import ConfigError
from luthier.data.batches import collate
from luthier.formats import save_packed
from luthier.train.baseline import check_floats, contenders
from luthier.train.prepare import prepare
from luthier.train.run import train
from luthier.train.settings import RunSettings

Make = Callable[..., RunSettings]
FULL = {"full": True, "schedule": "constant", "warmup": 0.0, "learning_rate": 1e-3, "max_steps": 5, "max_grad_norm": 0.5}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model_folder(
    request: pytest.FixtureRequest, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> tuple[Path, bool]:
    settings = {"hidden": 32, "layers": 2, "tie_word_embeddings": request.param}
    return save_tiny_model(tmp_path / "model", tiny_llama, tiny_tokenizer, **settings), request.param


def trained_by_torch(folder: Path, settings: RunSettings) -> dict[str, Tensor]:
    """Train every weight of the model on the same rows with torch alone, in float64."""
    prepared = prepare(settings)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _, micro_batches in prepared.steps:
        (indices,) = micro_batches
        batch = collate([prepared.rows.train.rows[index] for index in indices], 0)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits[:, :-1]
        labels = batch.labels[:, 1:]
        torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}


def test_every_weight_goes_where_plain_torch_would_take_it(run_settings: Make, model_folder: tuple[Path, bool]) -> None:
    folder, tied = model_folder
    settings = run_settings(out="run", model=str(folder), lora={"r": 16}, train=FULL)
    expected = trained_by_torch(folder, settings)
    outcome = train(settings)
    found = load_file(outcome.adapter / "adapter_model.safetensors")
    found = {key.removeprefix("base_model.model."): value for key, value in found.items()}
    assert found.keys() == expected.keys() | ({"lm_head.weight"} if tied else set())
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].double(), weight, rtol=1e-4, atol=2e-6)
    assert outcome.summary["trained_parameters"] == sum(
        parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters()
    )
    if tied:
        assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_settings_of_pairs_are_refused_beside_a_full_fine_tune(run_settings: Make) -> None:
    with pytest.raises(ConfigError, match=r"makes no pairs, so lora\.r, lora\.lora_alpha, lora\.use_dora, train\.freeze_A"):
        run_settings(lora={"use_dora": True}, train={"full": True, "freeze_A": True})


def test_ranks_keep_the_scaling_and_everything_else(run_settings: Make) -> None:
    given = run_settings(lora={"r": 3, "lora_alpha": 12, "target_modules": ["q_proj"]}, train={"freeze_A": True})
    found = contenders(given, [1, 6], 1e-5)
    assert [each.lora.lora_alpha for name, each in found.items() if name != "full"] == [4, 24]
    for r in (1, 6):
        back = found[f"r{r}"].changed(out=given.out, lora=found[f"r{r}"].lora.changed(r=3, lora_alpha=12))
        assert back == given
    assert found["full"].data == given.data
    assert (found["full"].train.full, found["full"].train.freeze_A, found["full"].train.learning_rate) == (True, False, 1e-5)


@pytest.mark.parametrize(
    ("settings", "ranks", "words"),
    [
        ({}, [2, 2], "each once"),
        ({"lora": {"rank_pattern": {"q_proj": 2}}}, [2], "rank_pattern"),
        ({"lora": {"r": 16}, "train": {"full": True}}, [2], "leave it out"),
        ({"data": {"eval_path": None, "eval_fraction": 0.0}}, [2], "nothing to compare by"),
        ({"quantize": "nf4"}, [2], r"quantize is 'nf4': a full fine-tune trains every weight(.|\n)*-s quantize=none"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused(run_settings: Make, settings: dict, ranks: list[int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        contenders(run_settings(**settings), ranks, 1e-5)


def test_a_full_fine_tune_of_a_folder_in_4_bits_is_refused(
    run_settings: Make, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama(vocab=len(tiny_tokenizer), hidden=64, layers=1)
    quantize_linears(model)
    folder = save_packed(model, tmp_path / "packed", tokenizer=tiny_tokenizer)
    with pytest.raises(ConfigError, match="packed holds weights in 4 bits"):
        check_floats(str(folder))
    with pytest.raises(ConfigError, match="weights in 4 bits cannot be trained; name the float model"):
        prepare(run_settings(model=str(folder), lora={"r": 16}, train={"full": True}))
    check_floats(run_settings().model)
