"""adapter_config.json: what is written, what is understood, and what is refused rather than ignored."""

import json
import re

import hypothesis.strategies as st
import pytest
from hypothesis import given

from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import AdapterFormatError
from luthier.formats.adapter_config import dump_config, parse_config

MINIMAL = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
# The keys that PEFT 0.21.2 writes for LoRA.
_PEFT = """
    alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias corda_config
    ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights kasa_config
    layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_bias lora_dropout
    lora_ga_config megatron_config megatron_core modules_to_save monteclora_config peft_type peft_version
    qalora_group_size r rank_pattern revision target_modules target_parameters task_type trainable_token_indices
    use_bdlora use_dora use_qalora use_rslora velora_config
"""
KEYS_OF_PEFT = _PEFT.split()


def parsed(**values: object) -> LoraConfig:
    return parse_config(json.dumps(MINIMAL | values), "here")


@st.composite
def configs(draw: st.DrawFn) -> LoraConfig:
    """Draw any configuration that LoraConfig takes."""
    words = st.from_regex(re.compile(r"[a-z_]{1,8}(\.[a-z_]{1,8})?", re.ASCII), fullmatch=True)
    names = st.lists(words, min_size=1, max_size=3, unique=True)
    alphas = st.integers(1, 512).map(float) | st.floats(1e-3, 1e3)
    targets = draw(names | words)
    blocks = (
        draw(st.none() | st.integers(0, 90) | st.lists(st.integers(0, 90), max_size=3)) if isinstance(targets, list) else None
    )
    return LoraConfig(
        r=draw(st.integers(1, 512)),
        lora_alpha=draw(alphas),
        target_modules=targets,
        exclude_modules=draw(st.none() | names | words),
        lora_dropout=draw(st.floats(0, 0.99)),
        bias=draw(st.sampled_from(["none", "all", "lora_only"])),
        use_rslora=draw(st.booleans()),
        init_lora_weights=draw(st.sampled_from([True, False, "gaussian"])),
        rank_pattern=draw(st.dictionaries(words, st.integers(1, 99), max_size=3)),
        alpha_pattern=draw(st.dictionaries(words, alphas, max_size=3)),
        layers_to_transform=blocks,
        layers_pattern=draw(st.none() | names | words) if blocks is not None else None,
        modules_to_save=draw(st.none() | names),
        task_type=draw(st.none() | st.just("CAUSAL_LM")),
        base_model_name_or_path=draw(st.none() | st.text(max_size=20)),
    )


def in_order_of_a_file(config: LoraConfig) -> LoraConfig:
    lists = {key: getattr(config, key) for key in ("target_modules", "exclude_modules", "modules_to_save")}
    return LoraConfig(**(dict(config) | {key: sorted(value) for key, value in lists.items() if isinstance(value, list)}))


@given(configs())
def test_what_is_written_is_read_back(config: LoraConfig) -> None:
    again = parse_config(dump_config(config), "here")
    assert again == in_order_of_a_file(config)
    assert list(again.rank_pattern) == list(config.rank_pattern)
    assert list(again.alpha_pattern) == list(config.alpha_pattern)


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")))
def test_no_text_does_anything_but_parse_or_be_refused(text: str) -> None:
    with pytest.raises(AdapterFormatError):
        parse_config(text, "here")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(KEYS_OF_PEFT), json_values, max_size=4))
def test_no_value_of_a_known_key_does_anything_but_parse_or_be_refused(values: dict[str, object]) -> None:
    try:
        config = parse_config(json.dumps(MINIMAL | values), "here")
    except AdapterFormatError:
        return
    assert config.r >= 1 and 0 < config.lora_alpha < float("inf")


def test_the_keys_are_those_of_peft_in_the_order_of_peft() -> None:
    assert list(json.loads(dump_config(LoraConfig()))) == KEYS_OF_PEFT


def test_lists_are_sorted_and_whole_alphas_are_integers() -> None:
    config = LoraConfig(target_modules=["v_proj", "q_proj"], lora_alpha=16, alpha_pattern={"q": 4.0, "k": 4.5})
    written = json.loads(dump_config(config))
    assert written["target_modules"] == ["q_proj", "v_proj"]
    assert written["lora_alpha"] == 16 and isinstance(written["lora_alpha"], int)
    assert written["alpha_pattern"] == {"q": 4, "k": 4.5} and isinstance(written["alpha_pattern"]["q"], int)


def test_a_minimal_config_takes_pefts_defaults() -> None:
    assert parsed() == LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])


def test_unknown_keys_are_told(caplog: pytest.LogCaptureFixture) -> None:
    assert parsed(brand_new=3, another=None).r == 4
    assert "another, brand_new" in caplog.text


@pytest.mark.parametrize("key", ["enable_lora", "runtime_config", "peft_version", "megatron_core", "auto_mapping"])
def test_keys_that_say_nothing_are_passed_over(key: str, caplog: pytest.LogCaptureFixture) -> None:
    assert parsed(**{key: "anything"}) == parsed()
    assert not caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_qalora", True),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("alora_invocation_tokens", [1]),
        ("loftq_config", {"loftq_bits": 4}),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", ["gaussian"]),
        ("init_lora_weights", None),
    ],
    ids=str,
)
def test_a_method_that_cannot_be_applied_is_refused(key: str, value: object) -> None:
    with pytest.raises(AdapterFormatError, match=rf"{key}=.*cannot apply"):
        parsed(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("init_lora_weights", "mica"),
        ("velora_config", {"num_groups": 2, "init_type": "random", "scale": 1.0}),
        ("monteclora_config", {"num_samples": 2}),
    ],
    ids=str,
)
def test_what_counted_in_training_alone_is_left_out(key: str, value: object) -> None:
    assert parsed(**{key: value}) == parsed()
    assert json.loads(dump_config(parsed(**{key: value})))[key] in (None, True)


def test_all_methods_that_cannot_be_applied_are_named_at_once() -> None:
    with pytest.raises(AdapterFormatError, match=r"use_qalora=True.*init_lora_weights='pissa'"):
        parsed(use_qalora=True, init_lora_weights="pissa")


@pytest.mark.parametrize("value", [None, False, {}, []], ids=str)
def test_every_way_to_say_not_used_is_understood(value: object) -> None:
    assert parsed(target_parameters=value, loftq_config=value, trainable_token_indices=value) == parsed()


@pytest.mark.parametrize("init", ["orthogonal", "eva"])
def test_an_init_that_is_spent_when_the_numbers_are_there(init: str) -> None:
    assert parsed(init_lora_weights=init).init_lora_weights is True


@pytest.mark.parametrize("value", ["", [], None])
def test_an_empty_layers_pattern_means_any(value: object) -> None:
    assert parsed(layers_pattern=value).layers_pattern is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "peft_type"),
        ('{"r": 4}', "peft_type"),
        ('{"peft_type": "IA3"}', "'IA3'"),
        ('{"peft_type": "LOHA"}', "'LOHA'"),
        ('{"peft_type": ["LORA"]}', "LORA"),
        ('{"peft_type": "LORA", "r": 0, "target_modules": ["q"]}', "r: "),
        ('{"peft_type": "LORA", "r": "many", "target_modules": ["q"]}', "r: "),
        ('{"peft_type": "LORA", "lora_alpha": NaN, "target_modules": ["q"]}', "NaN is not a finite number"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999, "target_modules": ["q"]}', "1e999 is not a finite number"),
        ('{"peft_type": "LORA", "target_modules": []}', "nothing would be trained"),
        ('{"peft_type": "LORA", "target_modules": "q_(proj"}', "regular expression"),
        ('{"peft_type": "LORA", "target_modules": ".*", "layers_to_transform": [1]}', "layers_to_transform"),
    ],
)
def test_what_is_wrong_is_said(text: str, word: str) -> None:
    with pytest.raises(AdapterFormatError, match=re.escape(word)) as caught:
        parse_config(text, "some/adapter_config.json")
    assert "some/adapter_config.json" in str(caught.value)


def test_adalora_is_written_with_pefts_keys_and_read_back() -> None:
    from peft import AdaLoraConfig as Theirs

    config = AdaLoraConfig(target_modules=["q"], init_r=2, target_r=1, rank_pattern={"q.lora_E": [True, False]}, total_step=9)
    text = dump_config(config)
    assert parse_config(text, "here") == config
    assert json.loads(text).keys() == Theirs(total_step=9).to_dict().keys() - {"runtime_config"}


def test_what_peft_ignores_in_adalora_is_ignored() -> None:
    values = {"peft_type": "ADALORA", "r": 4, "use_rslora": True, "alpha_pattern": {"q": 3}, "init_lora_weights": "gaussian"}
    config = parse_config(json.dumps(values | {"target_modules": ["q"], "rank_pattern": None}), "here")
    assert config == AdaLoraConfig(target_modules=["q"])


def test_an_adalora_configuration_without_steps_is_one_that_peft_takes() -> None:
    from peft import AdaLoraConfig as Theirs

    written = json.loads(dump_config(AdaLoraConfig(target_modules=["q"], tinit=3, tfinal=4)))
    assert Theirs(**{key: written[key] for key in ("total_step", "tinit", "tfinal")}).total_step == 8
