"""LoraConfig and Settings: what is refused, that all faults come at once, and that near misses are named."""

import math
from typing import Any

import pytest

from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import ConfigError


def test_defaults_are_valid_and_nothing_can_be_changed() -> None:
    config = LoraConfig()
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 8, "all-linear")
    with pytest.raises(ValueError, match="frozen"):
        config.r = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"r": 0}, "r: .*greater than or equal to 1.*given: 0"),
        ({"r": 2.5}, "r: .*given: 2.5"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": math.inf}, "lora_alpha.*finite"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout.*less than 1"),
        ({"bias": "some"}, "bias.*none"),
        ({"init_lora_weights": "pizza"}, "init_lora_weights"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.*at least 1"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern.*positive"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern.*finite"),
        ({"rank_pattern": {"q_(": 4}}, r"'q_\(' is not a regular expression"),
        ({"target_modules": "q_[proj"}, "is not a regular expression"),
        ({"exclude_modules": "*"}, "is not a regular expression"),
        ({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "h("}, "is not a regular expression"),
        ({"target_modules": []}, "nothing would be trained"),
        ({"layers_to_transform": [0]}, "has an effect only where target_modules is a list"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "no effect without layers_to_transform"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LoraConfig(**settings)


def test_every_fault_comes_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(r=-1, lora_alpha=-2, rang=3, bias="some")
    message = str(caught.value)
    assert message.startswith("LoraConfig has 4 fault(s)")
    assert all(word in message for word in ("r: ", "lora_alpha: ", "'rang'", "bias: "))


@pytest.mark.parametrize(("given", "meant"), [("lora_alhpa", "lora_alpha"), ("target_module", "target_modules"), ("rank", "r")])
def test_an_unknown_key_names_what_is_known(given: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**{given: 1})
    assert f"unknown key '{given}'" in str(caught.value)
    if len(meant) > 1:  # nothing of one letter is close to a word
        assert f"Did you mean '{meant}'" in str(caught.value)
    assert meant in str(caught.value).split("Known: ")[1].split(", ")


def test_changed_validates_like_a_new_one() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    changed = config.changed(r=16)
    assert (config.r, changed.r) == (4, 16)
    assert changed.target_modules == ["q_proj"]
    with pytest.raises(ConfigError):
        config.changed(r=0)


def test_modules_to_save_alone_is_enough() -> None:
    assert LoraConfig(target_modules=[], modules_to_save=["score"]).modules_to_save == ["score"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"r": 4}, "r has no effect in AdaLoRA: set init_r .* and target_r"),
        ({"use_rslora": True}, "use_rslora has no effect"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern has no effect"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian' has no effect"),
        ({"target_r": 13}, "target_r is 13, more than init_r, 12"),
        ({"total_step": 30, "tinit": 10, "tfinal": 20}, "is 30 of 30 optimiser steps"),
        ({"rank_pattern": {"q_proj.lora_E": [True]}}, "rank_pattern needs init_r=12 values"),
        ({"beta1": 1.0}, "beta1"),
        ({"deltaT": 0}, "deltaT"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight"),
        ({"init_rank": 4}, "unknown key 'init_rank'"),
        ({"r": 4, "target_r": 20}, r"(?s)r has no effect.*; target_r is 20"),
    ],
)
def test_impossible_settings_of_adalora_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        AdaLoraConfig(**settings)


def test_a_mask_says_which_triplets_a_layer_has() -> None:
    config = AdaLoraConfig(init_r=3, target_r=3, rank_pattern={"first.q_proj.lora_E": [True, False, True]})
    assert config.mask_of("first.q_proj") == [True, False, True]
    assert config.mask_of("second.q_proj") == [True, True, True]
