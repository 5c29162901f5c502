"""Figures for metrics: what vLLM writes at /metrics (lines of a real one), and what the gateway counts itself."""

from prometheus_client.parser import text_string_to_metric_families

from luthier.engine.requests import Completion
from luthier.serve.metrics import engine_families
from luthier.serve.vllm.figures import Figures, read_gauges

TEXT = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="luthier-raw-base"} 3.0
vllm:num_requests_running{engine="1",model_name="luthier-raw-base"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="luthier-raw-base"} 4.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="luthier-raw-base"} 0.25
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",cache_dtype="auto",engine="0",num_gpu_blocks="80",num_cpu_blocks="None"} 1.0
# TYPE vllm:num_requests_running_more gauge
vllm:num_requests_running_more{engine="0"} 9.0
"""


def test_what_vllm_writes_is_read_and_summed_over_its_engines():
    assert read_gauges(TEXT) == {"running": 5, "waiting": 4, "share": 0.25, "kv_tokens": 80 * 128}
    assert list(text_string_to_metric_families(TEXT))  # it is the format that Prometheus reads


def test_without_figures_nothing_is_made_up():
    assert read_gauges("") == {}
    assert read_gauges('vllm:cache_config_info{block_size="None"} 1.0') == {"kv_tokens": 0}


def test_they_are_those_of_the_engine_for_metrics():
    figures = Figures()
    figures.loaded("a:1", 0.5, 1000)
    figures.loaded("b:1", 0.25, None)
    told = figures.told({"a:1": "resident", "b:1": "failed", "c:1": "loading"}, read_gauges(TEXT)) | {"restarts": 2}
    found = {sample.name: sample.value for family in engine_families(told) for sample in family.samples if not sample.labels}
    assert found["luthier_adapter_bytes"] == 1000 and found["luthier_engine_restarts_total"] == 2
    assert (found["luthier_adapter_loads_total"], found["luthier_adapter_failures_total"]) == (2, 1)
    assert found["luthier_kv_tokens"] == 2560
    stages = {
        sample.labels["stage"]: sample.value
        for family in engine_families(told)
        for sample in family.samples
        if sample.name == "luthier_engine_requests"
    }
    assert stages == {"loading": 1, "waiting": 4, "prefilling": 0, "decoding": 5}


def test_the_longest_wait_is_of_those_without_a_token():
    figures = Figures()
    first = figures.begin()
    figures.begin()
    assert figures.told({}, {})["scheduler"]["longest_wait_seconds"] > 0
    figures.first(first)
    figures.first(first)
    figures.first(2)
    assert figures.told({}, {})["scheduler"]["longest_wait_seconds"] == 0


def test_answers_are_counted_by_how_they_ended():
    figures = Figures()
    figures.ended(Completion("ab", (1, 2), "stop", prompt_tokens=9, cached_tokens=4))
    figures.ended(Completion("a", (1,), "length", prompt_tokens=3))
    told = figures.told({}, {})
    assert (told["ended_stop"], told["ended_length"]) == (1, 1)
    assert (told["prompt_tokens"], told["cached_tokens"], told["new_tokens"]) == (8, 4, 3)
