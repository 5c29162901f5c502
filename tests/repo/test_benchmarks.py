"""The benchmarks run, tiny, so that their defaults cannot rot; what they measure is not looked at here."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import text
from tests.postgres import postgres_programs
from tests.tiny_run import save_tiny_model

ROWS = [
    {"text": f"put song {n} on my list", "intent": "AddToPlaylist", "slots": {"song": f"song {n}", "playlist": "my list"}}
    for n in range(9)
]


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Callable[..., torch.nn.Module], tiny_tokenizer: object) -> Path:
    """A folder with a tiny model in `model` and a few rows under the names of the real data."""
    save_tiny_model(tmp_path / "model", tiny_llama, tiny_tokenizer)
    for name in ("snips_json_train.jsonl", "snips_json_test.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def result_of(root: Path, folder: Path, *command: str) -> dict[str, Any]:
    """Run a benchmark on the tiny model and rows and return its last line."""
    run = subprocess.run(
        [sys.executable, str(root / "benchmarks" / command[0]), "--model", "model", "--data", ".", *command[1:]],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_snips_runs_tiny(root: Path, folder: Path) -> None:
    result = result_of(root, folder, "snips.py", "--out", "run", "--steps", "2", "--limit", "4")
    assert result["steps"] == 2
    assert result["base"]["n"] == result["adapter"]["n"] == 4


def test_preference_runs_tiny(root: Path, folder: Path) -> None:
    chats = [{"prompt": f"Who is {n % 5}?", "chosen": f"It is {n}.", "rejected": f"No idea, {n}."} for n in range(12)]
    (folder / "preference_vicuna.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    size = ("--sft-steps", "2", "--steps", "2", "--pairs", "8", "--held-out", "6", "--limit", "4")
    timed = ("--timed-steps", "1", "--rounds", "1", "--step-pairs", "3")
    result = result_of(root, folder, "preference.py", "--out", "run", *size, *timed)
    assert result["snips"]["preference_accuracy"]["n"] == 6 and result["snips"]["exact"]["n"] == 4
    assert result["vicuna"]["held_out_prompts"] == 1 and result["vicuna"]["steps"] == 1
    losses = result["speed"]["first_loss"]
    assert losses["luthier_dpo"] == pytest.approx(losses["trl_dpo"], abs=1e-5) == pytest.approx(0.6931472, abs=1e-5)
    pairs = [json.loads(line) for line in (folder / "run" / "pairs.jsonl").read_text().splitlines()]
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)


def test_grpo_runs_tiny(root: Path, folder: Path) -> None:
    size = ("--sft-steps", "2", "--steps", "2", "--limit", "4", "--prompts", "2", "--group", "2", "--room", "8")
    result = result_of(
        root, folder, "grpo.py", "--out", "run", *size, "--timed-steps", "1", "--rounds", "1", "--dtype", "float32"
    )
    assert result["learn"]["steps"] == 2
    assert result["learn"]["held_out_reward"]["n"] == 4
    assert set(result["speed"]["answer_tokens_per_s"]) == {"luthier", "luthier_model", "trl"}
    assert (folder / "run" / "reward.png").stat().st_size > 1000


def test_weight_forms_runs_tiny(root: Path, folder: Path) -> None:
    size = ("--rounds", "1", "--tokens", "3", "--long", "20", "--texts", "1", "--dtype", "float32")
    result = result_of(root, folder, "weight_forms.py", *size)
    assert set(result["forms"]) == {"float", "int8", "int4", "nf4"}
    for row in result["forms"].values():
        assert row["nats_per_token"] == pytest.approx(result["forms"]["float"]["nats_per_token"], abs=0.5)


def test_gate_simulation_runs_tiny(root: Path, folder: Path) -> None:
    result = result_of(root, folder, "gate_simulation.py", "--trials", "4", "--items", "60")["found"]
    kinds = {
        f"{kind}, n = 60" for kind in ("single items", "in 5 slices", "in clusters of 5", "graded", "graded in clusters of 5")
    }
    assert set(result) == kinds
    for figures in (figures for kind in result.values() for figures in kind.values()):
        assert figures["fail"] + figures["pass"] + figures["inconclusive"] == pytest.approx(1)
        assert {"found", "tolerance", "unpaired", "mcnemar", "standard_errors"} <= set(figures)


@pytest.mark.slow
def test_train_step_runs_tiny(root: Path, folder: Path) -> None:
    size = ("--rounds", "1", "--steps", "1", "--rows", "2", "--length", "32", "--dtype", "float32")
    result = result_of(root, folder, "train_step.py", *size, "--only", "floor", "peft", "luthier")
    assert set(result["tokens_per_s"]) == {"floor", "peft", "luthier"}
    assert result["loss"]["peft"] == pytest.approx(result["loss"]["luthier"], rel=1e-5)
    assert {"vs_peft", "memory_vs_peft", "share_of_floor"} <= set(result)
    for errors in result["error_against_float64"].values():
        assert errors["gradients"] < 1e-4


@pytest.mark.slow
def test_dora_step_runs_tiny(root: Path, folder: Path) -> None:
    size = ("--rounds", "1", "--steps", "1", "--rows", "2", "--length", "32", "--dtype", "float32")
    result = result_of(root, folder, "dora_step.py", *size)
    assert set(result["cpu_seconds_per_step"]) == {"luthier_lora", "luthier_dora", "peft_lora", "peft_dora"}
    assert result["loss"]["peft_dora"] == pytest.approx(result["loss"]["luthier_dora"], rel=1e-5)
    assert {"dora_vs_lora", "peft_dora_vs_dora", "memory"} <= set(result)


@pytest.mark.slow
def test_qlora_step_runs_tiny(root: Path, folder: Path) -> None:
    size = ("--rounds", "1", "--steps", "1", "--rows", "2", "--length", "32", "--dtype", "float32")
    result = result_of(root, folder, "qlora_step.py", *size)
    assert set(result["cpu_seconds_per_step"]) == {"luthier", "luthier_nf4", "peft_nf4", "reading"}
    assert result["loss"]["peft_nf4"] == pytest.approx(result["loss"]["luthier_nf4"], rel=1e-5)
    assert result["bits_per_weight"]["luthier_nf4"] < 8 < result["bits_per_weight"]["luthier"] == 32
    assert {"step_vs_dense", "static_vs_dense", "vs_peft_nf4"} <= set(result)


SERVE = ("serve.py", "--tiny", "--dtype", "float32", "--threads", "1")


@pytest.mark.slow
def test_serve_runs_tiny_beside_peft(root: Path, folder: Path) -> None:
    result = result_of(root, folder, *SERVE, "--only", "peft", "transformers", "vllm", "--vllm-python", "nowhere/python")
    assert set(result["left_out"]) == {"vllm"}
    assert "no vLLM at nowhere/python" in result["left_out"]["vllm"]
    assert set(result["table"]["peft"]) == {"eight", "one", "base", "single", "single_base", "prefill"}
    assert set(result["table"]["transformers"]) == {"base", "single_base"}
    for figures in (figures for by_title in result["table"].values() for figures in by_title.values()):
        assert 0 < figures["first_token_p50_s"] <= figures["latency_p50_s"] <= figures["seconds"]
    rows = result["isolation"]["peft"]
    assert rows["base_rows_as_alone"] == rows["base_rows"] == 2
    assert rows["adapter_rows_as_alone"] == rows["adapter_rows"] == 2


@pytest.mark.slow
def test_serve_runs_tiny_with_luthier(root: Path, folder: Path) -> None:
    result = result_of(root, folder, *SERVE, "--only", "luthier", "peft")
    assert result["left_out"] == {}
    for words in ("eight_adapters", "one_adapter", "single", "prefill", "base"):
        assert result[f"{words}_vs_peft"] > 0
    assert result["eight_adapters_vs_base"] > 0
    rows = result["isolation"]["luthier"]
    assert rows["base_rows_as_alone"] == rows["base_rows"] == 2
    assert rows["adapter_rows_as_alone"] == rows["adapter_rows"] == 2


@pytest.mark.slow
def test_serve_many_runs_tiny(root: Path, folder: Path) -> None:
    result = result_of(root, folder, "serve_many.py", "--tiny", "--dtype", "float32", "--threads", "1")
    assert result["adapters"] == 12 and result["many_vs_eight"] > 0 and result["many_vs_eight_by_cpu"] > 0
    assert result["loads_per_request"]["eight"] == 0 and result["active_adapters"] == 32
    assert 1 <= result["tokens_per_step"]["many"] <= 4
    assert 0 < result["peak_gib"] <= result["limit_gib"] == 4
    assert min(result["cold"].values()) > 0
    assert 0 <= result["tenants"]["quiet_share_of_tokens"] <= 1


def test_serve_soak_runs_tiny(root: Path, folder: Path) -> None:
    size = ("--clients", "6", "--minutes", "0.1", "--adapters", "2", "--prompts", "3", "--tokens", "8", "--threads", "1")
    result = result_of(root, folder, "serve_soak.py", *size, "--rounds", "1", "--cost-requests", "6")
    soak = result["soak"]
    assert soak["wrong"] == {} and soak["errors"] == {}
    assert soak["requests"] == sum(soak["ended"].values()) > 20
    assert soak["ended"]["left"] > 0 and soak["models"] == 3
    assert not any(result["left_over"].values())
    assert result["different_answers"] > 1 / 3  # or an answer of the wrong adapter would not be seen
    assert set(soak["memory_mib"]) == {"at_20", "at_100"}
    assert result["cost"]["gateway_of_engine_cpu"] > 0 and result["cost"]["http_of_direct_speed"] > 0


@pytest.mark.slow
def test_adapter_cycles_run_tiny(root: Path, folder: Path) -> None:
    size = ("--cycles", "9", "--settle", "2", "--every", "3", "--adapters", "2", "--dtype", "float32", "--threads", "1")
    result = result_of(root, folder, "adapter_cycles.py", *size)
    assert list(result["held_mib"]) == ["2", "3", "6", "9"]
    assert result["loads"] == result["cycles"] == 9
    assert 0 < result["last_vs_start"] <= result["worst_vs_start"]


def test_structured_runs_tiny(root: Path, folder: Path) -> None:
    size = ("--limit", "4", "--batch", "2", "--max-new-tokens", "120", "--dtype", "float32", "--threads", "1")
    result = result_of(root, folder, "structured.py", *size)
    assert result["n"] == 4 and result["invalid_though_whole"] == []
    assert result["valid"] >= 4 - result["cut_off"]
    assert result["ms_per_token_with"] > 0 and len(result["overheads"]) == len(result["overheads_cpu"]) == 2


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        ('{"intent": "A", "slots": {"x": "1"}}', True),
        ('{"intent": "A", "slots": {}}', True),
        ('{"intent": "A", "slots": {"x": "1"}', False),
        ('{"intent": "C", "slots": {}}', False),
        ('{"intent": "A"}', False),
        ('{"intent": "A", "slots": {"z": "1"}}', False),
        ('{"intent": "A", "slots": {"x": 1}}', False),
        ('{"intent": "A", "slots": {"x": "%s"}}' % ("a" * 25), False),
        ('{"intent": "A", "slots": {"x": "", "y": "", "w": ""}}', False),
        ('{"intent": "A", "slots": {}, "more": 1}', False),
        ('["A"]', False),
    ],
)
def test_structured_tells_valid_from_invalid(root: Path, text: str, is_valid: bool) -> None:
    benchmark = runpy.run_path(str(root / "benchmarks/structured.py"))
    assert benchmark["is_valid"](text, ["A", "B"], ["x", "y", "w"]) is is_valid


def test_serve_many_counts_a_share_only_while_both_tenants_wait(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    benchmark = runpy.run_path(str(root / "benchmarks/serve_many.py"))
    answered, share = benchmark["Answered"], benchmark["share"]
    # The flood holds both rows for ten seconds; then the tenants have one row each, until the last of the quiet one begins at 30.
    flood = [answered(0, 0, 10, 10), answered(0, 0, 10, 10), *(answered(0, t, t + 10, 10) for t in (10, 20, 30, 40))]
    quiet = [answered(5, t, t + 10, 10) for t in (10, 20, 30)]
    assert share(quiet, flood) == pytest.approx(0.5)
    assert share([answered(5, t, t + 10, 10) for t in (50, 60)], flood) == 0.0  # served after all of the flood
    slighted = [answered(5, 10, 40, 10), answered(5, 40, 50, 10)]
    assert share(slighted, flood) == pytest.approx(10 / 40)


@pytest.mark.slow
def test_train_epoch_runs_tiny(root: Path, folder: Path) -> None:
    size = ("--rows", "9", "--held-out", "4", "--seeds", "1", "--dtype", "float32")
    result = result_of(root, folder, "train_epoch.py", *size, "--only", "trl_no_checkpointing", "trl_packing", "luthier")
    assert {"rows_per_s", "vs_trl", "vs_trl_packing", "eval_loss_minus_trl"} <= set(result)
    # Two steps of a model that has learnt nothing yet: the same loss but for the order of the rows.
    assert result["eval_loss"]["luthier"] == pytest.approx(result["eval_loss"]["trl_no_checkpointing"], rel=0.02)


@pytest.mark.slow
def test_train_memory_runs_tiny(root: Path, folder: Path) -> None:
    result = result_of(
        root, folder, "train_memory.py", "--lengths", "16", "32", "--only", "short", "--steps", "2", "--plot", "p.png"
    )
    assert set(result["by_length"]) == {"16", "32"}
    assert set(result["settings"]) == {"short"}
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_plan_memory_runs_tiny(root: Path, folder: Path) -> None:
    result = result_of(root, folder, "plan_memory.py", "--only", "lora_short", "qlora", "--steps", "1")
    assert set(result) == {"lora_short", "qlora"}
    assert all({"planned_gib", "peak_gib", "error"} <= set(each) for each in result.values())


def test_capability_damage_runs_tiny(root: Path, folder: Path) -> None:
    size = ("--suite", "grammar", "neutral", "--noise", "0.4", "--limit", "3")
    result = result_of(root, folder, "capability_damage.py", *size)
    assert {name: one["n"] for name, one in result.items()} == {"grammar": 3, "neutral": 3}
    assert result["neutral"]["noise 0.4"]["mean"] != result["neutral"]["base"]["mean"]
    assert {"lost", "won", "p_value"} <= set(result["grammar"]["noise 0.4"])


@pytest.mark.slow
def test_variants_run_tiny(root: Path, folder: Path) -> None:
    size = ("--steps", "4", "--held-out", "3", "--match", "2", "--seeds", "1")
    result = result_of(root, folder, "variants.py", *size, "--only", "lora", "dora", "adalora", "pissa")
    means = result["means"]
    assert set(means) == {"lora", "dora", "adalora", "pissa"}
    assert means["lora"]["parameters"] < means["dora"]["parameters"] < means["adalora"]["parameters"]
    assert all(each["eval_loss"] > 0 and each["cpu_seconds"] > 0 for each in means.values())
    assert all(0 <= each["exact"] <= each["intent"] <= each["valid_json"] <= 1 for each in means.values())


@pytest.mark.slow
def test_an_interrupted_run_of_variants_continues_where_it_stopped(root: Path, folder: Path) -> None:
    size = ("--steps", "2", "--held-out", "3", "--match", "0", "--out", "runs.jsonl")
    result_of(root, folder, "variants.py", *size, "--seeds", "1", "--only", "lora")
    before = (folder / "runs.jsonl").read_bytes()
    (first,) = map(json.loads, before.splitlines())
    with pytest.raises(AssertionError, match="steps was 2, is now 3"):  # runs of other arguments are not mixed
        result_of(root, folder, "variants.py", *size, "--seeds", "2", "--only", "lora", "--steps", "3")
    assert (folder / "runs.jsonl").read_bytes() == before
    result = result_of(root, folder, "variants.py", *size, "--seeds", "2", "--only", "lora", "rslora")
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert lines[0] == first  # to the last digit of its seconds: it was not run again
    assert [(line["method"], line["seed"]) for line in lines] == [("lora", 0), ("rslora", 0), ("lora", 1), ("rslora", 1)]
    one, other = (line["figures"]["eval_loss"] for line in lines if line["method"] == "lora")
    assert result["means"]["lora"]["eval_loss"] == pytest.approx((one + other) / 2)
    assert result["deviations"]["lora"]["eval_loss"] == pytest.approx(abs(one - other) / 2**0.5)


def test_registry_questions_run_tiny(root: Path, folder: Path) -> None:
    result = result_of(root, folder, "registry_questions.py", "--versions", "200", "--repeats", "2")
    assert set(result) == ({"sqlite", "postgresql"} if postgres_programs() else {"sqlite"})
    for kind, by_size in result.items():
        assert set(by_size) == {"20", "200"}
        for question, one in by_size["200"].items():
            assert one["ms"] > 0
            # PostgreSQL may read small tables whole where the answer is a tenth of them, but never to walk.
            assert one["scans"] == [] or (kind, question) == ("postgresql", "in production for customers")
        assert by_size["200"]["trained on a person's rows"]["rows"] > 0


def test_serving_view_runs_tiny(root: Path, folder: Path) -> None:
    result = result_of(root, folder, "serving_view.py", "--versions", "100", "--tenants", "4", "--repeats", "2")
    kinds = ("sqlite", "postgresql") if postgres_programs() else ("sqlite",)
    for kind in kinds:
        assert all(value > 0 for one in result[kind].values() for value in one.values())
        # A hundred versions for each of four tenants, and what is called by an alias; the other view has a part of them.
        assert 400 < result[kind]["view, all for all"]["names"] < 600 and result[kind]["view"]["names"] < 400


@pytest.mark.slow
def test_registry_promotions_runs_tiny(root: Path, folder: Path) -> None:
    result = result_of(root, folder, "registry_promotions.py", "--kills", "12", "--longest", "0.2")
    assert result["kills"] == 12 and result["changes"] > 12
    assert result["faults"] == []


def test_registry_promotions_sees_what_is_half_done(root: Path, tmp_path: Path) -> None:
    benchmark = runpy.run_path(str(root / "benchmarks/registry_promotions.py"))
    versions = benchmark["prepare"](str(tmp_path / "registry"), tmp_path)
    registry = benchmark["open_registry"](tmp_path / "registry")

    def faults_after(statement: str) -> str:
        with registry.database.writing() as session:
            session.execute(text(statement))
        return "\n".join(benchmark["look"](registry, told=1)[0])

    benchmark["promote"](registry, versions[1], "shop", actor="dan")
    assert benchmark["look"](registry, told=2) == ([], 2)
    assert "3 changes were confirmed" in str(benchmark["look"](registry, told=3))
    assert "alias" in faults_after("UPDATE alias SET version_id = 1, adapter_id = 1")
    assert "in the outbox" in faults_after("DELETE FROM outbox WHERE event = 'surface.changed'")
    assert "served from" in faults_after("UPDATE deployment SET started_at = '2030-01-01 00:00:00.000000' WHERE ended_at IS NULL")
    assert "open weights are [10000, 10000]" in faults_after("UPDATE deployment SET ended_at = NULL")
    registry.database.engine.dispose()


def test_train_processes_runs_tiny(root: Path, folder: Path) -> None:
    size = ("--steps", "2", "--length", "16", "--rows", "2", "--only", "one process", "fsdp2, 4 bits")
    result = result_of(root, folder, "train_processes.py", *size)
    assert set(result["cases"]) == {"one process", "fsdp2, 4 bits"}
    assert all(case["steps"] == 2 for case in result["cases"].values())
