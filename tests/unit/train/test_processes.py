"""Several real processes: what they exchange, what a sharded base computes, and how an error of one of them ends them all."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_run import ENVIRONMENT

from luthier.core.errors import ConfigError
from luthier.train.launching import process_of
from luthier.train.processes import joined
from luthier.train.run import train
from luthier.train.runfolder import RunFolder
from luthier.train.settings import RunSettings
from luthier.train.world import World

PLANNED = [[0], [1], [2], [3], [4], [5], [6]]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
def test_micro_batches_are_dealt_out_whole_and_idle_processes_are_known(size: int) -> None:
    worlds = [World(rank, size) for rank in range(size)]
    shares = [world.share(PLANNED) for world in worlds]
    assert sorted(batch for share in shares for batch in share) == PLANNED
    most = max(map(len, shares))
    for world, share in zip(worlds, shares, strict=True):
        assert most - len(share) == int(world.is_idle_at_the_end(PLANNED))


def test_alone_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with joined() as world:
        assert world == World()
        assert world.sum([0.1, math.inf]) == [0.1, math.inf]
        assert world.sum_figures({"reward": 0.3}) == {"reward": 0.3}
        assert (world.any(True), world.any(False)) == (True, False)
        assert world.from_first("runs/one") == "runs/one"


def test_the_environment_says_which_process_this_is() -> None:
    assert process_of({}) == (0, 1)
    assert process_of({"WORLD_SIZE": "4"}) == (0, 1)  # a batch system's, without a rank: nobody started several of us
    assert process_of({"RANK": "3", "WORLD_SIZE": "4"}) == (3, 4)


def in_processes(size: int, program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program (it has `folder`) in `size` processes; its exit status is that of the whole."""
    body = f"from pathlib import Path\nfolder = Path({str(folder)!r})\n{program}"
    launcher = (
        "import sys\nfrom luthier.train.launching import run_processes\n"
        f"ending = run_processes([sys.executable, '-c', {body!r}], {size})\nsys.exit(ending.status)"
    )
    words = [sys.executable, "-c", launcher]
    return subprocess.run(words, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=240)


EXCHANGE = """
import json, torch
from luthier.train.processes import joined
with joined() as world:
    r = world.rank
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(4)] + [torch.nn.Parameter(torch.zeros(5).double())]
    parameters[0].grad = torch.full((2, 3), 0.1 * (r + 1))
    if r == 2:
        parameters[1].grad = torch.arange(6.0).view(2, 3)
    parameters[3].requires_grad_(False)
    parameters[4].grad = torch.full((5,), 0.1 * (r + 1)).double()
    world.sum_gradients(parameters)
    copied = [torch.full((3,), float(r)), torch.arange(6.0).view(2, 3).T * (r + 1)]
    world.copy_from_first(copied)
    found = {
        "sum": world.sum([0.1 * (r + 1), float("inf") if r == 1 else 1.0, 1e300]),
        "figures": world.sum_figures({"both": 0.5, **({"mine": 2.0} if r == 2 else {})}),
        "any": [world.any(r == 2), world.any(False)],
        "first": world.from_first({"out": f"run-{r}"} if r == 0 else None),
        "gathered": world.gather([r, "x" * r]),
        "bytes": [raw.hex() for raw in world.gather_bytes(bytes([r]) * (3 * r))],
        "gradients": [None if each.grad is None else each.grad.tolist() for each in parameters],
        "copied": [each.tolist() for each in copied],
    }
    (folder / f"{r}.json").write_text(json.dumps(found))
"""


def test_three_processes_exchange_numbers_to_the_bit(tmp_path: Path) -> None:
    done = in_processes(3, EXCHANGE, tmp_path)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert found[0] == found[1] == found[2]
    (each,) = found[:1]
    assert each["sum"] == [0.1 + 0.2 + 0.1 * 3, math.inf, 3e300]
    assert each["figures"] == {"both": 1.5, "mine": 2.0}
    assert each["any"] == [True, False]
    assert each["first"] == {"out": "run-0"}
    assert each["gathered"] == [[0, ""], [1, "x"], [2, "xx"]]
    assert each["bytes"] == ["", "010101", "02" * 6]
    first, second, none, frozen, double = each["gradients"]
    torch.testing.assert_close(torch.tensor(first), torch.full((2, 3), 0.6))
    assert second == [[0, 1, 2], [3, 4, 5]]  # one process had a gradient, so all have
    assert none is frozen is None
    torch.testing.assert_close(torch.tensor(double), torch.full((5,), 0.6), rtol=1e-7, atol=0)
    assert each["copied"] == [[0.0] * 3, [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]]


FAILS = """
import sys, time
from luthier.cli.output import report_error
from luthier.core.errors import LuthierError, TrainingError
from luthier.train.processes import joined
try:
    with joined() as world:
        if {condition}:
            raise TrainingError("the glue did not hold")
        while True:
            world.wait_for_all()
except LuthierError as error:
    sys.exit(report_error(error, as_json=False))
"""


@pytest.mark.parametrize("condition", ["world.rank == 1", "True"], ids=["one of them", "all of them"])
def test_an_error_ends_all_and_is_told_once(condition: str, tmp_path: Path) -> None:
    done = in_processes(2, FAILS.format(condition=condition), tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("the glue did not hold") == 1
    assert done.stderr.count("Error") == 1, done.stderr


SHARDED = """
import json, torch
from transformers import LlamaConfig, LlamaForCausalLM
from luthier.adapt.attaching import attach, detach
from luthier.adapt.fusing import fuse
from luthier.adapt.merging import merge
from luthier.adapt.packing import quantize_linears
from luthier.adapt.state import adapter_parameters
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterStateError
from luthier.data.batches import collate, pack
from luthier.data.encode import EncodedRow
from luthier.engine.score import answer_loss, held_out_loss
from luthier.train.processes import joined
from luthier.train.sharding import ShardedModel

IDS = [[(i * 7 + j * 3) % 97 for j in range(5 + i)] for i in range(7)]
ROWS = [EncodedRow(i, ids, ids) for i, ids in enumerate(IDS)]
CASES = {
    "tied head": ({"tie": True}, {}),
    "own head": ({}, {}),
    "adapted embedding and head": ({"tie": True}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "DoRA": ({}, {"use_dora": True}),
    "whole norm": ({}, {"modules_to_save": ["norm"]}),
    "4 bits": ({"nf4": True}, {}),
    "checkpointing": ({"checkpointing": True}, {}),
    "the model's own passes": ({"plain": True}, {}),
}

def made(model_settings, lora):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=91, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, tie_word_embeddings="tie" in model_settings)
    model = LlamaForCausalLM(config).eval()
    if "nf4" in model_settings:
        quantize_linears(model)
    attach(model, LoraConfig(**({"r": 3, "lora_alpha": 6, "target_modules": "all-linear"} | lora)))
    for item in adapter_parameters(model):
        if item.parameter.ndim == 2:  # a factor at zero would leave the other without a gradient
            torch.nn.init.normal_(item.parameter, std=0.05)
    if "plain" not in model_settings:
        fuse(model)
    if "checkpointing" in model_settings:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()

def gradients(model):
    return {item.path + item.role: item.parameter.grad.clone() for item in adapter_parameters(model)}

def held(model):
    return sum(each.to_local().nbytes if hasattr(each, "to_local") else each.nbytes for name, each in model.named_parameters()
               if ".lora." not in name and ".replacements." not in name and not hasattr(each, "stored"))

with joined() as world:
    found = {}
    for name, (model_settings, lora) in CASES.items():
        whole, model = made(model_settings, lora), made(model_settings, lora)
        lay = (lambda rows: collate(rows, 0)) if "plain" in model_settings else pack
        batches = [lay(ROWS[:3]), lay(ROWS[3:5]), lay(ROWS[5:])]
        for batch in batches:
            answer_loss(whole, batch)[0].backward()
        wanted, wanted_held_out = gradients(whole), held_out_loss(whole, ROWS, 0).loss
        before = held(model)
        sharded = ShardedModel(model, world.size)
        for batch in world.share(batches):
            sharded.run(answer_loss, model, batch)[0].backward()
        if world.is_idle_at_the_end(batches):
            (sharded.run(answer_loss, model, batches[0])[0] * 0).backward()
        world.sum_gradients(item.parameter for item in adapter_parameters(model))
        error = max(float((each - wanted[key]).norm() / wanted[key].norm()) for key, each in gradients(model).items())
        held_out = sharded.run(lambda: held_out_loss(model, ROWS, 0).loss)
        sharded.rest()
        refusals = []
        for change in (detach, merge):
            try:
                change(model)
            except AdapterStateError as refusal:
                refusals.append(str(refusal))
        codes = [each.stored.codes.untyped_storage().nbytes() for each in model.parameters() if hasattr(each, "stored")]
        smallest, share = min(float(each.norm()) for each in wanted.values()), held(model) / before
        found[name] = {"error": error, "smallest": smallest, "share": share, "held out": [held_out, wanted_held_out],
                       "refusals": refusals, "codes": codes}
    (folder / f"{world.rank}.json").write_text(json.dumps(found))
"""


def test_a_sharded_base_gives_the_gradients_of_a_whole_one(tmp_path: Path) -> None:
    done = in_processes(2, SHARDED, tmp_path)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads((tmp_path / "0.json").read_text())
    assert len(found) == 8
    for name, each in found.items():
        assert each["smallest"] > 0, name
        assert each["error"] < 1e-5, name
        assert each["held out"][0] == pytest.approx(each["held out"][1], rel=1e-6), name
        assert [refusal for refusal in each["refusals"] if "spread over several processes" in refusal] == each["refusals"]
        assert len(each["refusals"]) == 2, name
        if name != "4 bits":
            assert each["share"] == pytest.approx(0.5, abs=0.01), name
    assert len(found["4 bits"]["codes"]) == 14
    assert not any(found["4 bits"]["codes"]), "codes that were gathered are still held"


def test_settings_that_need_several_processes(run_settings: Callable[..., RunSettings]) -> None:
    with pytest.raises(ConfigError, match="no effect in one process"):
        train(run_settings(train={"shard": "fsdp2"}))
    with pytest.raises(ConfigError, match=r"train\.shard would save nothing"):
        RunSettings(model="tiny", out="run", data={"path": "rows.jsonl"}, train={"shard": "fsdp2", "full": True})  # type: ignore[arg-type]


def test_who_carries_a_run_out_is_not_in_its_digest(run_settings: Callable[..., RunSettings]) -> None:
    plain = run_settings()
    assert plain.digest() == run_settings(train={"processes": 1, "shard": "fsdp2"}).digest()
    assert plain.digest() != run_settings(train={"processes": 2}).digest()


DROPS = """
import json, sys
from luthier.train.loop import Trainer
from luthier.train.prepare import prepare
from luthier.train.processes import joined
from luthier.train.run import resume, train
from luthier.train.runfolder import RunFolder
from luthier.train.settings import read_settings

with joined() as world:
    settings = read_settings(folder / "config.toml")
    train(settings.changed(out=str(folder / "whole")))
    stopped = settings.changed(out=str(folder / "stopped"))
    trainer = Trainer(prepare(stopped), RunFolder.create(stopped) if world.is_first else RunFolder(stopped.out), world=world)
    with trainer.running():
        for _ in range(3):
            trainer.advance()
        trainer.stop_requested = world.rank == 1
        ended = trainer.advance()
    world.wait_for_all()
    resume(folder / "stopped")
    (folder / f"{world.rank}.txt").write_text(ended)
"""


def test_as_many_processes_resume_with_the_same_bits(run_settings: Callable[..., RunSettings], tmp_path: Path) -> None:
    settings = run_settings(lora={"lora_dropout": 0.3}, train={"epochs": 3, "save_every": 1, "processes": 2, "eval_every": 2})
    (tmp_path / "config.toml").write_text(settings.to_toml())
    done = in_processes(2, DROPS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["interrupted", "interrupted"]
    whole, stopped = (RunFolder(tmp_path / name) for name in ("whole", "stopped"))
    last = whole.load_checkpoint()
    assert last is not None and last[0].step > 4
    names = ("adapter/adapter_model.safetensors", "optimizer.safetensors")
    for name in names:
        assert (stopped.step_folder(last[0].step) / name).read_bytes() == (whole.step_folder(last[0].step) / name).read_bytes()
    assert not torch.equal(last[1]["rng.cpu"], last[1]["rank1.rng.cpu"]), "both processes would drop the same"
