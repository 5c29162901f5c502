"""lm-evaluation-harness and our runner on the same items: the same log-likelihoods, answers and scores.

Tasks over local JSON, on a random model and (few items) on the real one.
"""

import json
import os
from dataclasses import replace

import pytest
import torch

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from luthier.adapt import attach, disabled
from luthier.core.config import LoraConfig
from luthier.core.errors import ConfigError, DataError
from luthier.engine.likelihood import log_likelihoods
from luthier.evaluate.harness import harness_scores, run_harness
from luthier.evaluate.prompts import option_ids, start_ids, text_ids
from luthier.evaluate.runner import run_suite
from luthier.evaluate.suites import load_suite

START = "<|endoftext|>"
QUESTION = "Question: {{ question }}\nAnswer:"
WINDOW = 48
LAST_NUMBER = {"function": "regex", "regex_pattern": "(-?[0-9]+)", "group_select": -1}


def write_suites(folder, shared_data, n):
    """Write n items of BLiMP, OpenBookQA, documents and GSM8K; for each a suite file and lm-eval's task over the same file."""
    folder.mkdir(exist_ok=True)

    def rows(name, keep=lambda row: True):
        lines = (shared_data / name).read_text().splitlines()
        kept = [row for row in map(json.loads, lines) if keep(row)]
        return kept[:: max(1, len(kept) // n)][:n]

    blimp = rows("blimp_30.jsonl")
    choices = rows("mc_general.jsonl", lambda row: row["task"] == "openbookqa")
    maths = rows("gsm8k_test.jsonl")
    documents = [{"text": f"{row['question']} {row['answer']}"} for row in maths]
    maths = [{"question": row["question"], "answer": row["answer"].split("####")[-1].strip()} for row in maths]
    texts = {
        "pairs": (blimp, 'type = "pairs"\ngood = "{{ good }}"\nbad = "{{ bad }}"'),
        "choice": (
            choices,
            f'type = "choice"\nprompt = {json.dumps(QUESTION)}\n'
            'options = "{{ choices | tojson }}"\nanswer = "{{ answer }}"',
        ),
        "rolling": (documents, f'type = "rolling"\ntext = "{{{{ text }}}}"\nwindow = {WINDOW}'),
        "maths": (
            maths,
            f'type = "generate"\nprompt = {json.dumps(QUESTION)}\nreference = "{{{{ answer }}}}"\nscore = "exact"\nchat = false\n'
            'pattern = "-?[0-9]+"\nmax_new_tokens = 16\nstop = ["\\n"]',
        ),
    }
    suites = {}
    for name, (lines, definition) in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        kind = "drift" if name == "rolling" else "capability"
        (folder / f"{name}.toml").write_text(f'name = "{name}"\nkind = "{kind}"\ndata = "{name}.jsonl"\n{definition}\n')
        suites[name] = load_suite(folder / f"{name}.toml")
    asked = {
        "pairs": {
            "output_type": "multiple_choice",
            "doc_to_text": "",
            "doc_to_target": 0,
            "target_delimiter": "",
            "doc_to_choice": "{{[good, bad]}}",
            "metric_list": [{"metric": "acc"}],
        },
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": START + QUESTION,
            "doc_to_target": "{{answer}}",
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "maths": {
            "output_type": "generate_until",
            "doc_to_text": START + QUESTION,
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
            "filter_list": [{"name": "last", "filter": [LAST_NUMBER, {"function": "take_first"}]}],
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    common = {"dataset_path": "json", "test_split": "test"}
    tasks = [
        {
            "task": name,
            **common,
            **values,
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")},
        }
        for name, values in asked.items()
    ]
    return suites, tasks


@pytest.fixture(scope="module")
def tiny(tiny_llama, tiny_tokenizer):
    model = tiny_llama(vocab=len(tiny_tokenizer), seed=5, initializer_range=0.3, max_position_embeddings=1024)
    attach(model, LoraConfig(r=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model, tiny_tokenizer


def check_pairs(model, tokenizer, suite, task):
    rows = [text for item in suite.items for text in (item.good, item.bad)]
    ours = log_likelihoods(model, [(start_ids(tokenizer), ids) for ids in text_ids(rows, tokenizer)])
    theirs = [float(response[0]) for sample in task.samples for response in sample["filtered_resps"]]
    assert ours == pytest.approx(theirs, rel=2e-5)


def check_choices(model, tokenizer, suite, task):
    prompts = [(item.prompt, option) for item in suite.items for option in item.options]
    ours = log_likelihoods(model, option_ids(suite.definition, prompts, tokenizer))
    theirs = [float(response[0]) for sample in task.samples for response in sample["filtered_resps"]]
    assert ours == pytest.approx(theirs, rel=2e-5)


def check_all(model, tokenizer, suites, tasks):
    """Items, log-likelihoods, answers and scores are lm-eval's. Returns the mean of each suite, ours and theirs."""
    whole = [task for task in tasks if task["task"] != "rolling"]
    found = {task.name: task for task in run_harness(model, tokenizer, whole, batch_size=4)}
    rolling = [task for task in tasks if task["task"] == "rolling"]
    found |= {task.name: task for task in run_harness(model, tokenizer, rolling, batch_size=4, max_length=WINDOW)}
    check_pairs(model, tokenizer, suites["pairs"], found["pairs"])
    check_choices(model, tokenizer, suites["choice"], found["choice"])
    means = {}
    for name, metric in (("pairs", "acc"), ("choice", "acc"), ("maths", "exact_match")):
        ours, theirs = run_suite(model, tokenizer, suites[name]), harness_scores(found[name], metric)
        assert [(item.id, item.score) for item in ours.items] == [(item.id, item.score) for item in theirs.items], name
        assert found[name].results[f"{metric},{'last' if name == 'maths' else 'none'}"] == pytest.approx(ours.mean)
        means[name] = (ours.mean, theirs.mean)
    answers = run_suite(model, tokenizer, suites["maths"]).items
    assert [item.output for item in answers] == [sample["resps"][0][0] for sample in found["maths"].samples]
    ours = run_suite(model, tokenizer, suites["rolling"])
    lengths = [len(ids) for ids in text_ids([item.text for item in suites["rolling"].items], tokenizer)]
    assert max(lengths) > 2 * WINDOW
    theirs = [-float(sample["filtered_resps"][0]) / n for sample, n in zip(found["rolling"].samples, lengths, strict=True)]
    assert [item.score for item in ours.items] == pytest.approx(theirs, rel=2e-5)
    means["rolling"] = (ours.mean, sum(theirs) / len(theirs))
    by_length = suites["choice"].definition.changed(normalise="characters")
    ours = run_suite(model, tokenizer, replace(suites["choice"], definition=by_length))
    assert [item.score for item in ours.items] == [item.score for item in harness_scores(found["choice"], "acc_norm").items]
    return means


def test_lm_eval_and_our_runner_agree_on_a_random_model(tiny, shared_data, tmp_path):
    model, tokenizer = tiny
    suites, tasks = write_suites(tmp_path / "suites", shared_data, 6)
    with_adapter = check_all(model, tokenizer, suites, tasks)
    with disabled(model):
        base = check_all(model, tokenizer, suites, tasks)
    assert base["rolling"] != with_adapter["rolling"]


@pytest.mark.slow
def test_lm_eval_and_our_runner_agree_on_the_real_model(smollm2, shared_data, tmp_path):
    from luthier.models import load_model

    loaded = load_model(str(smollm2), dtype="float32")
    n = int(os.environ.get("LUTHIER_LM_EVAL_ITEMS", "12"))
    suites, tasks = write_suites(tmp_path / "suites", shared_data, n)
    print(n, check_all(loaded.model, loaded.tokenizer, suites, tasks))


def test_tasks_and_metrics_that_are_not_there_are_told(tiny, shared_data, tmp_path):
    model, tokenizer = tiny
    with pytest.raises(ConfigError, match="no_such_task"):
        run_harness(model, tokenizer, ["no_such_task"])
    _, tasks = write_suites(tmp_path / "suites", shared_data, 2)
    (task,) = run_harness(model, tokenizer, [tasks[0]], limit=1)
    assert len(task.samples) == 1
    with pytest.raises(DataError, match="have no number under 'f1'; it has acc"):
        harness_scores(task, "f1")
