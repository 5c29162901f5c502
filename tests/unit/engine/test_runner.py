"""Every row of a mixed batch is the same request alone: against transformers with the adapters' dense update in its weights."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from luthier.engine.building import decoder_for
from luthier.engine.layouts import UnknownLayoutError
from luthier.engine.runner import Piece, Runner

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LAYOUTS = {
    "llama": LlamaConfig(**SIZES),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=6),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 with windows": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=24),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
    "gemma2": Gemma2Config(**SIZES, head_dim=16, sliding_window=5, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=5, query_pre_attn_scalar=16),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Pair:
    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None


def random_model(config) -> nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_adapter(model, rank: int, seed: int, targets=TARGETS, dora: bool = False) -> dict[str, Pair]:
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.rsplit(".", 1)[-1] in targets:
            out, width = module.weight.shape
            A = torch.randn(rank, width, generator=generator) * 0.3
            B = torch.randn(out, rank, generator=generator) * 0.3
            pairs[path] = Pair(A, B, 0.5 + torch.rand(out, generator=generator) if dora else None)
    return pairs


def merged(model, *mix: tuple[dict[str, Pair], float]) -> nn.Module:
    """A copy whose weights hold the dense update, formed in float64."""
    model = copy.deepcopy(model)
    for path in {path for pairs, _ in mix for path in pairs}:
        layer = model.get_submodule(path)
        weight = layer.weight.double()
        for pairs, strength in mix:
            if path in pairs:
                weight = weight + strength * pairs[path].B.double() @ pairs[path].A.double()
                if pairs[path].magnitude is not None:
                    weight = weight * pairs[path].magnitude.double()[:, None]
        layer.weight = nn.Parameter(weight.float())
    return model


@torch.inference_mode()
def alone(model, ids: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max()))
    assert int(found.argmax()) == int(wanted.argmax())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_row_of_a_mixed_batch_is_the_request_alone(layout):
    model = random_model(LAYOUTS[layout])
    adapters = {f"a{n}": random_adapter(model, rank, n) for n, rank in enumerate((1, 2, 4, 4, 8, 3))}
    dora = random_adapter(model, 4, 7, ("q_proj", "up_proj", "down_proj"), dora=True)
    runner = Runner(decoder_for(model))
    for key, pairs in {**adapters, "dora": dora}.items():
        runner.activate(key, pairs["model.layers.0.self_attn.q_proj"].A.shape[0], pairs)
    mixes = {"base": (), "mix": (("a1", 0.5), ("a4", -1.5)), "dora": (("dora", 1.0),), "weak": (("a2", 0.25),)}
    mixes |= {key: ((key, 1.0),) for key in adapters}
    whole = {**adapters, "dora": dora}
    wanted = {name: merged(model, *((whole[key], strength) for key, strength in mix)) for name, mix in mixes.items()}
    generator = torch.Generator().manual_seed(1)
    texts = {name: torch.randint(96, (20 + 9 * place,), generator=generator).tolist() for place, name in enumerate(mixes)}
    done: dict[str, int] = {}
    waiting = list(mixes)
    for step in range(200):
        if waiting and step % 3 == 0:  # they come at different times and in pieces of different lengths
            name = waiting.pop()
            runner.open(name, mixes[name], texts[name], len(texts[name]) + 130 * (len(name) % 2))
            done[name] = 0
        if not done:
            break
        sizes = {name: (1, 7, 40)[step % 3] if done[name] < 12 or len(texts[name]) > 70 else 1 for name in done}
        pieces = [Piece(name, texts[name][done[name] : done[name] + size]) for name, size in sizes.items()]
        logits = runner.step(pieces).logits
        for row, piece in enumerate(pieces):
            done[piece.id] += len(piece.tokens)
            assert_same(logits[row], alone(wanted[piece.id], texts[piece.id][: done[piece.id]])[-1])
            if done[piece.id] == len(texts[piece.id]):
                del done[piece.id]
                runner.close(piece.id)
    assert not done and not waiting and runner.kv.bytes == 0


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_of_one_adapter_take_the_short_way_and_are_the_same(rows):
    model = random_model(LAYOUTS["llama"])
    runner = Runner(decoder_for(model))
    adapters = [random_adapter(model, 4, seed) for seed in range(4)]
    for seed, pairs in enumerate(adapters):
        runner.activate(f"a{seed}", 4, pairs)
    for seed in range(4):
        for row in range(rows):
            runner.open(f"{seed}.{row}", ((f"a{seed}", 1.0),), [], 20)
    ids = [f"{seed}.{row}" for row in range(rows) for seed in range(4)]
    for token in range(3):
        logits = runner.step([Piece(id, [token + int(id[0])]) for id in ids]).logits
    for place, id in enumerate(ids):
        seed = int(id[0])
        wanted = alone(merged(model, (adapters[seed], 1.0)), [token + seed for token in range(3)])[-1]
        assert_same(logits[place], wanted)


def test_long_prompts_of_one_adapter_run_together_and_stay_apart():
    model = random_model(LAYOUTS["llama"])
    pairs = {key: random_adapter(model, rank, rank) for key, rank in {"a": 4, "b": 3}.items()}
    runner = Runner(decoder_for(model))
    for key, own in pairs.items():
        runner.activate(key, 4, own)
    generator = torch.Generator().manual_seed(2)
    requests = {
        name: torch.randint(96, (size,), generator=generator).tolist()
        for name, size in zip("abcdef", (40, 33, 5, 60, 35, 1), strict=True)
    }
    mixes = dict(zip(requests, ((("a", 1.0),), (("a", 1.0),), (("b", 1.0),), (("b", 1.0),), (("a", 0.5),), ()), strict=True))
    for name, ids in requests.items():
        runner.open(name, mixes[name], ids, 64)
    logits = runner.step([Piece(name, ids) for name, ids in requests.items()]).logits
    for row, (name, ids) in enumerate(requests.items()):
        wanted = merged(model, *((pairs[key], strength) for key, strength in mixes[name]))
        assert_same(logits[row], alone(wanted, ids)[-1])


def test_the_base_s_prompt_between_rows_of_one_adapter_stays_the_base_s():
    """Rows that go on come before prompts, so the only adapter of a step has rows on both sides of the base's prompt."""
    model = random_model(LAYOUTS["llama"])
    pairs = random_adapter(model, 4, 3)
    runner = Runner(decoder_for(model))
    runner.activate("a", 4, pairs)
    texts = {"goes on": [1, 2, 3], "base": [4, 5, 6, 7], "begins": [8, 9]}
    mixes = {"goes on": (("a", 1.0),), "base": (), "begins": (("a", 1.0),)}
    for name, text in texts.items():
        runner.open(name, mixes[name], [], 8)
        if name == "goes on":
            runner.step([Piece(name, text[:2])])
    logits = runner.step([Piece("goes on", [3]), Piece("base", texts["base"]), Piece("begins", texts["begins"])]).logits
    for row, (name, text) in enumerate(texts.items()):
        wanted = merged(model, (pairs, 1.0)) if mixes[name] else model
        assert_same(logits[row], alone(wanted, text)[-1])


def test_an_adapter_on_the_output_layer_counts():
    model = random_model(LAYOUTS["llama"])
    pairs = random_adapter(model, 4, 3, ("lm_head", "v_proj"))
    runner = Runner(decoder_for(model))
    runner.activate("head", 4, pairs)
    runner.open("x", (("head", 1.0),), [], 8)
    runner.open("y", (), [], 8)
    logits = runner.step([Piece("y", [1, 2, 3]), Piece("x", [1, 2, 3])]).logits
    assert_same(logits[0], alone(model, [1, 2, 3])[-1])
    assert_same(logits[1], alone(merged(model, (pairs, 1.0)), [1, 2, 3])[-1])


def test_adapters_that_come_and_go_leave_nothing_behind():
    model = random_model(LAYOUTS["llama"])
    adapters = [random_adapter(model, 1 + seed % 5, seed, TARGETS if seed % 2 else ("q_proj", "v_proj")) for seed in range(12)]
    wanted = [alone(merged(model, (pairs, 1.0)), [5, 6, 7])[-1] for pairs in adapters]
    runner = Runner(decoder_for(model))
    active: list[int] = []
    for turn in range(40):
        new = (7 * turn) % 12
        if new not in active:
            if len(active) == 4:
                runner.deactivate(f"a{active.pop(turn % 4)}")
            runner.activate(f"a{new}", 1 + new % 5, adapters[new])
            active.append(new)
        for seed in active:
            runner.open(f"{turn}.{seed}", ((f"a{seed}", 1.0),), [], 8)
        logits = runner.step([Piece(f"{turn}.{seed}", [5, 6, 7]) for seed in active]).logits
        for row, seed in enumerate(active):
            assert_same(logits[row], wanted[seed])
            runner.close(f"{turn}.{seed}")
    for seed in active:
        runner.deactivate(f"a{seed}")
    assert runner.stacks.bytes == 0


def test_a_prompt_seen_before_is_continued_from_what_is_kept_and_only_by_the_same_adapters():
    model = random_model(LAYOUTS["qwen3"])
    adapters = {"a0": random_adapter(model, 4, 0), "a1": random_adapter(model, 4, 1)}
    runner = Runner(decoder_for(model), prefix_bytes=2**20)
    for key, pairs in adapters.items():
        runner.activate(key, 4, pairs)
    text = torch.randint(96, (100,), generator=torch.Generator().manual_seed(2)).tolist()
    for turn, (mix, kept) in enumerate(
        [((("a0", 1.0),), 0), ((("a1", 1.0),), 0), ((), 0), ((("a0", 0.5),), 0), ((("a0", 1.0),), 96), ((), 96)]
    ):
        there = runner.open(str(turn), mix, text, 110)
        assert there == runner.cached_tokens(mix, text) == kept
        logits = runner.step([Piece(str(turn), text[there:])]).logits
        wanted = merged(model, *((adapters[key], strength) for key, strength in mix))
        assert_same(logits[0], alone(wanted, text)[-1])
        runner.close(str(turn))
    assert runner.prefix is not None and runner.prefix.bytes <= 2**20


def test_a_prefix_is_never_the_whole_prompt_and_the_oldest_blocks_go_first():
    model = random_model(LAYOUTS["llama"])
    block_bytes = 2 * 2 * 2 * 32 * 8 * 4
    runner = Runner(decoder_for(model), prefix_bytes=3 * block_bytes)
    for start in range(3):
        text = [(start + each) % 96 for each in range(64)]
        runner.open(str(start), (), text, 70)
        runner.step([Piece(str(start), text)])
        runner.close(str(start))
    assert runner.prefix is not None and runner.prefix.bytes == 3 * block_bytes
    assert [runner.cached_tokens((), [(start + each) % 96 for each in range(65)]) for start in range(3)] == [0, 0, 64]
    assert runner.cached_tokens((), [(2 + each) % 96 for each in range(64)]) == 32


def test_scores_are_the_log_probabilities_of_the_targets():
    model = random_model(LAYOUTS["llama"])
    pairs = random_adapter(model, 4, 1)
    runner = Runner(decoder_for(model))
    runner.activate("a", 4, pairs)
    text = torch.randint(96, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    runner.open("x", (("a", 1.0),), text, 60)
    first = runner.step([Piece("x", text[:20], False, [-1] * 10 + text[11:21])])
    second = runner.step([Piece("x", text[20:59], False, text[21:60])])
    logprobs = alone(merged(model, (pairs, 1.0)), text).double().log_softmax(-1)
    wanted = [float(logprobs[place, text[place + 1]]) for place in range(10, 59)]
    assert first.scores[0] + second.scores[0] == pytest.approx(wanted, abs=1e-4)
    assert first.logits.shape == second.logits.shape == (0, 96)


def test_an_architecture_that_was_not_read_is_refused_by_name():
    from transformers import GPT2Config

    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UnknownLayoutError, match="gpt2"):
        decoder_for(model)


def test_a_model_whose_forward_was_changed_is_refused():
    model = random_model(LAYOUTS["llama"])
    model.model.layers[1].register_forward_hook(lambda module, args, output: output + 0.1)
    with pytest.raises(UnknownLayoutError, match="differs"):
        decoder_for(model)
