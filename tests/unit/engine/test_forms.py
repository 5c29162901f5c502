"""Weights in fewer bits are served as the model that holds those weights, with adapters on top; and a 4-bit base as it is."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from luthier import LoraConfig, attach, load_adapter, quantize_linears, save_adapter
from luthier.core.errors import BaseMismatchError, ConfigError
from luthier.engine import Engine, Sampling
from luthier.engine.building import decoder_for
from luthier.engine.runner import Piece, Runner
from luthier.formats.fingerprint import Verdict

LIMIT = {"float": 1e-5, "nf4": 1e-5, "int8": 2e-2, "int4": 3e-2}
"""Relative, in norm: products of int8 (few rows) and int4 are in bfloat16."""
TARGETS = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]
PROMPT = [7, 19, 200, 3, 41, 88, 5, 6, 150, 9, 12]


def make(tiny_llama, seed=0):
    return tiny_llama(hidden=64, vocab=410, seed=seed, initializer_range=0.2).eval()


def adapter(model, folder, seed, targets=TARGETS, save_embedding_layers=False, **config):
    """A folder of an adapter trained, as its note says, on `model` as it is."""
    model = copy.deepcopy(model)
    attach(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return save_adapter(model, folder, save_embedding_layers=save_embedding_layers)


@torch.inference_mode()
def logprobs(model, context, rest):
    logits = model(input_ids=torch.tensor([[*context, *rest]]), use_cache=False).logits[0].double().log_softmax(-1)
    return [float(logits[len(context) - 1 + place, token]) for place, token in enumerate(rest)]


def coarse(model, decoder):
    """A transformers model that holds the weights of a decoder."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for projection in decoder.projections:
            for path in projection.paths:
                model.get_parameter(f"{path}.weight").copy_(decoder.weight(path))
    return model


@pytest.mark.parametrize("form", LIMIT)
@torch.inference_mode()
def test_logits_are_those_of_the_model_that_holds_the_weights_with_an_adapter_on_top(form, tiny_llama, tmp_path):
    model = make(tiny_llama)
    folder = adapter(model, tmp_path / "a", 1)
    decoder = decoder_for(model, form)
    served = coarse(model, decoder)
    load_adapter(served, folder, force=True)
    wanted = served(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0]
    load_adapter(model, folder)
    in_floats = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0]

    runner = Runner(decoder)
    runner.activate("a", 4, pairs_of(folder))
    runner.open("x", (("a", 1.0),), PROMPT, 20)
    found = [runner.step([Piece("x", PROMPT[:9])]).logits[0]]
    found += [runner.step([Piece("x", [token])]).logits[0] for token in PROMPT[9:]]
    found, wanted, in_floats = torch.stack(found), wanted[8:], in_floats[8:]
    assert (found - wanted).norm() <= LIMIT[form] * wanted.norm()
    if form != "float":  # else the floats would pass for the coarser weights
        assert (found - wanted).norm() < 0.5 * (in_floats - wanted).norm()


def pairs_of(folder):
    from luthier.engine.adapters import Pair
    from luthier.formats import read_adapter

    tensors = read_adapter(folder).tensors
    stem = "base_model.model."
    paths = {key.removeprefix(stem).rsplit(".lora_", 1)[0] for key in tensors}
    return {
        path: Pair(tensors[f"{stem}{path}.lora_A.weight"], 2.0 * tensors[f"{stem}{path}.lora_B.weight"])  # alpha / r
        for path in paths
    }


@pytest.mark.parametrize("form", ["float", "nf4"])
def test_an_adapter_of_a_4_bit_base_is_served_on_that_base(form, tiny_llama, tiny_tokenizer, tmp_path):
    base = make(tiny_llama)
    quantize_linears(base)
    folder = adapter(base, tmp_path / "a", 1)
    wanted = copy.deepcopy(base)
    load_adapter(wanted, folder)
    with Engine(base, tiny_tokenizer, form=form, adapters={"a": folder}) as engine:
        assert engine.slow_because is None
        for name, model in (("a", wanted), (None, base)):
            [found] = engine.score([(PROMPT[:5], PROMPT[5:])], adapter=name)
            assert found == pytest.approx(logprobs(model, PROMPT[:5], PROMPT[5:]), abs=1e-4)


def test_a_base_served_in_nf4_is_the_one_that_was_loaded_in_nf4(tiny_llama):
    in_floats, in_nf4 = make(tiny_llama), make(tiny_llama)
    quantize_linears(in_nf4)
    here, there = decoder_for(in_floats, "nf4"), decoder_for(in_nf4, "nf4")
    for path in (path for projection in here.projections for path in projection.paths):
        assert torch.equal(here.weight(path), there.weight(path)), path


def test_a_4_bit_base_takes_no_adapter_of_another_one(tiny_llama, tiny_tokenizer, tmp_path):
    base, other = make(tiny_llama), make(tiny_llama, seed=5)
    quantize_linears(base)
    quantize_linears(other)
    folder = adapter(other, tmp_path / "a", 1)
    refused = pytest.raises(BaseMismatchError, match="trained on another base")
    with Engine(base, tiny_tokenizer, form="nf4", adapters={"a": folder}) as engine, refused:
        engine.generate([PROMPT], "a")


def test_an_adapter_of_another_base_is_served_where_it_is_forced_and_only_under_that_name(tiny_llama, tiny_tokenizer, tmp_path):
    base = make(tiny_llama)
    folder = adapter(make(tiny_llama, seed=5), tmp_path / "a", 1)
    wanted = copy.deepcopy(base)
    load_adapter(wanted, folder, force=True)
    with Engine(base, tiny_tokenizer, adapters={"as it is": folder}) as engine:
        engine.add_adapter("forced", folder, force=True)
        assert engine.check_adapter("forced").base.verdict is Verdict.MISMATCH
        with pytest.raises(BaseMismatchError, match="trained on another base"):
            engine.check_adapter("as it is")
        [found] = engine.score([(PROMPT[:5], PROMPT[5:])], adapter="forced")
    assert found == pytest.approx(logprobs(wanted, PROMPT[:5], PROMPT[5:]), abs=1e-4)


def test_an_adapter_that_is_merged_is_served_from_floats_in_any_form(tiny_llama, tiny_tokenizer, tmp_path):
    model = make(tiny_llama)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    folder = adapter(model, tmp_path / "a", 1, bias="all", modules_to_save=["norm"])
    wanted = copy.deepcopy(model)
    load_adapter(wanted, folder)
    with Engine.load(str(tmp_path / "base"), dtype="float32", form="int4", adapters={"a": folder}) as engine:
        [found] = engine.score([(PROMPT[:5], PROMPT[5:])], adapter="a")
    assert found == pytest.approx(logprobs(wanted, PROMPT[:5], PROMPT[5:]), abs=1e-4)


def test_an_adapter_with_a_copy_of_the_bases_own_table_is_served(tiny_llama, tiny_tokenizer, tmp_path):
    model = make(tiny_llama)
    folder = adapter(model, tmp_path / "a", 1, targets=[*TARGETS, "embed_tokens"], save_embedding_layers=True)
    wanted = copy.deepcopy(model)
    load_adapter(wanted, folder)
    with Engine(model, tiny_tokenizer, adapters={"a": folder}, reload=lambda: make(tiny_llama)) as engine:
        [found] = engine.score([(PROMPT[:5], PROMPT[5:])], adapter="a")
    assert found == pytest.approx(logprobs(wanted, PROMPT[:5], PROMPT[5:]), abs=1e-4)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_load_serves_the_base_that_is_asked_for(quantize, tiny_llama, tiny_tokenizer, tmp_path):
    model = make(tiny_llama)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    if quantize == "nf4":
        quantize_linears(model)
    with Engine.load(str(tmp_path / "base"), dtype="float32", quantize=quantize) as engine:
        [found] = engine.score([(PROMPT[:5], PROMPT[5:])])
        assert engine.generate([PROMPT], sampling=Sampling(max_new_tokens=3))[0].prompt_tokens == len(PROMPT)
    assert found == pytest.approx(logprobs(model, PROMPT[:5], PROMPT[5:]), abs=1e-4)


def test_a_form_that_cannot_be_is_refused_with_what_can(tiny_llama, tiny_tokenizer):
    with pytest.raises(ConfigError, match=r"form='int44' is no form of weights. Did you mean .* Write float, int8, int4, nf4."):
        Engine(make(tiny_llama), tiny_tokenizer, form="int44")
    with pytest.raises(ConfigError, match="'in8' is no form"):
        Engine.load("a model that is not read", form="in8")
    packed = make(tiny_llama)
    quantize_linears(packed)
    with pytest.raises(ConfigError, match="in NF4 already, and form='int8' would round its weights a second time"):
        Engine(packed, tiny_tokenizer, form="int8")
    unknown = GPT2LMHeadModel(GPT2Config(vocab_size=410, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match=r"form='nf4' is there for models that the engine runs itself.*gpt2"):
        Engine(unknown, tiny_tokenizer, form="nf4")
