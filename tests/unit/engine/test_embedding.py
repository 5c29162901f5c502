"""Embeddings against transformers' hidden states with PEFT's adapter, alone and beside other requests."""

import pytest
import torch
from tests.engine_scene import in_threads, prompts_of, with_adapter

from luthier.core.errors import ConfigError, DataError, RequestError
from luthier.engine import Engine, Limits, Sampling
from luthier.models.pooling import Pooling

LENGTHS = [1, 7, 40, 71]


def wanted(scene, adapter, ids, pooling):
    """The last hidden states, after the last norm, of a copy of the model that wears the adapter by PEFT."""
    with torch.no_grad():
        hidden_TI = with_adapter(scene.model, scene.folders.get(adapter))(
            torch.tensor([ids]), output_hidden_states=True
        ).hidden_states[-1][0]
    vector = {"mean": hidden_TI.double().mean(0), "last": hidden_TI[-1].double(), "first": hidden_TI[0].double()}[pooling.kind]
    return (vector / vector.norm() if pooling.normalize else vector).tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    "pooling", [Pooling("mean", True), Pooling("last", False), Pooling("first", False)], ids=lambda each: each.kind
)
def test_a_vector_is_the_pooled_last_hidden_states(scenes, family, pooling):
    scene = scenes(family)
    rows = prompts_of(LENGTHS)
    adapters = (None, "wide", "two") if family != "gpt2" else (None,)
    names = [name for name in adapters if name]
    # 16 tokens a step: long rows come in pieces, which have to add up.
    with Engine(
        scene.model,
        scene.tokenizer,
        adapters={name: scene.folders[name] for name in names},
        pooling=pooling,
        limits=Limits(prefill_tokens=16, kv_tokens=1000),
    ) as engine:
        for adapter in adapters:
            for vector, ids in zip(engine.embed(rows, adapter=adapter), rows, strict=True):
                assert vector == pytest.approx(wanted(scene, adapter, ids, pooling), abs=2e-4)


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
