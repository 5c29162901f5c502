"""Embeddings against transformers' hidden states with PEFT's adapter, alone and beside other requests."""

import pytest
import torch
from tests.engine_scene import in_threads, prompts_of, save_peft_adapter, with_adapter

from luthier.core.errors import ConfigError, DataError, RequestError
from luthier.engine import Engine, Limits, Sampling
from luthier.models.pooling import Pooling

LENGTHS = [1, 7, 40, 71]


POOLINGS = pytest.mark.parametrize(
    "pooling", [Pooling("mean", True), Pooling("last", False), Pooling("first", False)], ids=lambda each: each.kind
)


def pooled(model, ids, pooling):
    """The model's last hidden states, after its last norm, made one vector in float64."""
    with torch.no_grad():
        hidden_TI = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].double()
    vector = {"mean": hidden_TI.mean(0), "last": hidden_TI[-1], "first": hidden_TI[0]}[pooling.kind]
    return (vector / vector.norm() if pooling.normalize else vector).tolist()


def wanted(scene, adapter, ids, pooling):
    return pooled(with_adapter(scene.model, scene.folders.get(adapter)), ids, pooling)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@POOLINGS
def test_a_vector_is_the_pooled_last_hidden_states(scenes, family, pooling):
    """16 tokens a step: long rows come in pieces, which have to add up."""
    scene = scenes(family)
    rows = prompts_of(LENGTHS)
    with scene.engine("wide", "two", pooling=pooling, limits=Limits(prefill_tokens=16, kv_tokens=1000)) as engine:
        for adapter in (None, "wide", "two"):
            for vector, ids in zip(engine.embed(rows, adapter=adapter), rows, strict=True):
                assert vector == pytest.approx(wanted(scene, adapter, ids, pooling), abs=2e-4)


@POOLINGS
def test_models_that_run_through_their_own_forward(build_tiny, byte_tokenizer, tmp_path, pooling):
    model = build_tiny("gpt2")
    folder = save_peft_adapter(model, tmp_path, 0, r=4, target_modules=["c_attn", "c_fc"])
    rows = prompts_of(LENGTHS)
    with Engine(model, byte_tokenizer, adapters={"own": folder}, pooling=pooling) as engine:
        assert engine.slow_because
        for name, path in ((None, None), ("own", folder)):
            found = engine.embed(rows, adapter=name)
            for vector, ids in zip(found, rows, strict=True):
                assert vector == pytest.approx(pooled(with_adapter(build_tiny("gpt2"), path), ids, pooling), abs=2e-4)


@pytest.mark.parametrize("kind", ["mean", "last"])
def test_company_changes_no_vector(scenes, kind):
    """Twice, with other adapters' embeddings and answers in the same batches; the second time prompts are known."""
    scene, pooling = scenes(), Pooling(kind, True)
    rows = prompts_of(LENGTHS)
    with scene.engine("wide", "two", pooling=pooling) as engine:
        for _ in range(2):
            *vectors, answers = in_threads(
                [lambda name=name: engine.embed(rows, adapter=name) for name in (None, "wide", "two")]
                + [lambda: engine.generate(rows, "wide", Sampling(max_new_tokens=12))]
            )
            for adapter, found in zip((None, "wide", "two"), vectors, strict=True):
                for vector, ids in zip(found, rows, strict=True):
                    assert vector == pytest.approx(wanted(scene, adapter, ids, pooling), abs=2e-4)
            for answer, ids in zip(answers, rows, strict=True):
                scene.check(answer, "wide", ids, 12)


def test_what_has_no_vector(scenes):
    scene = scenes()
    with scene.engine("wide") as plain, pytest.raises(ConfigError, match="no embeddings: nothing says how"):
        plain.embed([[1, 2]])
    with scene.engine("wide", pooling=Pooling("mean", True)) as engine:
        with pytest.raises(DataError, match="empty"):
            engine.embed([[1], []])
        with pytest.raises(RequestError):
            engine.embed([[1] * 500])
        assert engine.embed([]) == []
