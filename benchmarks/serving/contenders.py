"""The engines themselves, each made from the plan in its own process. Libraries are imported where an engine is made.

`run` takes requests ({"prompt": ids, "adapter": name or None}) all at once, answers each greedily with exactly
`max_new_tokens` tokens, and returns for each its tokens, the seconds to its first token and to its last.
"""

import os
import time
from collections.abc import Callable
from typing import Any

Plan = dict[str, Any]
Rows = list[dict[str, Any]]


class Luthier:
    """This project's engine, as a caller of `luthier.engine` has it."""

    def __init__(self, plan: Plan) -> None:
        import torch

        import luthier
        from luthier.engine import Engine
        from luthier.engine.requests import Sampling

        torch.set_num_threads(plan["threads"])
        self._sampling = Sampling
        self._engine = Engine.load(plan["model"], dtype=plan["dtype"], adapters=plan["adapters"], prefix_cache=False)
        self.facts = {"version": luthier.__version__, "torch": torch.__version__}

    def run(self, requests: Rows, max_new_tokens: int) -> Rows:
        sampling = self._sampling(max_new_tokens=max_new_tokens, ignore_eos=True)
        prompts, adapters = [each["prompt"] for each in requests], [each["adapter"] for each in requests]
        return [
            row(done.token_ids, done.first_token_seconds, done.seconds)
            for done in self._engine.generate(prompts, adapters, sampling)
        ]


class Vllm:
    """vLLM's CPU build through its offline class. With `lora` it is started for adapters, as a server of them must be."""

    def __init__(self, plan: Plan, *, lora: bool) -> None:
        import torch
        import vllm
        from vllm.lora.request import LoRARequest

        count = len(plan["adapters"])
        settings = {"enable_lora": True, "max_loras": count, "max_cpu_loras": count, "max_lora_rank": plan["rank"]}
        self._engine = vllm.LLM(
            plan["model"],
            dtype=plan["dtype"],
            max_model_len=plan["max_length"],
            max_num_seqs=32,
            enable_prefix_caching=False,
            disable_log_stats=False,  # they carry the time of the first token
            **(settings if lora else {}),
        )
        self._sampling = vllm.SamplingParams
        self._adapters = {name: LoRARequest(name, i, folder) for i, (name, folder) in enumerate(plan["adapters"].items(), 1)}
        self.facts = {"version": vllm.__version__, "torch": torch.__version__, "preloaded": os.environ.get("LD_PRELOAD", "")}

    def run(self, requests: Rows, max_new_tokens: int) -> Rows:
        sampling = self._sampling(temperature=0.0, max_tokens=max_new_tokens, ignore_eos=True)
        prompts = [{"prompt_token_ids": each["prompt"]} for each in requests]
        wanted = [self._adapters[each["adapter"]] if each["adapter"] else None for each in requests]
        rows = []
        for done in self._engine.generate(prompts, sampling, lora_request=wanted, use_tqdm=False):
            times = done.metrics
            first = times.first_token_latency
            rows.append(row(done.outputs[0].token_ids, first, first + times.last_token_ts - times.first_token_ts))
        return rows


class Transformers:
    """transformers' own `generate` with the bare base: one static batch, padded on the left."""

    def __init__(self, plan: Plan) -> None:
        import torch
        import transformers

        torch.set_num_threads(plan["threads"])
        self._model = transformers.AutoModelForCausalLM.from_pretrained(plan["model"], dtype=getattr(torch, plan["dtype"])).eval()
        self.facts = {"version": transformers.__version__, "torch": torch.__version__}

    def run(self, requests: Rows, max_new_tokens: int) -> Rows:
        import torch

        longest = max(len(each["prompt"]) for each in requests)
        ids = torch.tensor([[0] * (longest - len(each["prompt"])) + each["prompt"] for each in requests])
        mask = torch.tensor([[0] * (longest - len(each["prompt"])) + [1] * len(each["prompt"]) for each in requests])
        began, firsts = time.perf_counter(), []

        def stopping(ids: torch.Tensor, scores: object, **others: object) -> torch.Tensor:
            firsts.append(time.perf_counter() - began)
            return torch.zeros(len(ids), dtype=torch.bool)

        settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens, "pad_token_id": 0}
        with torch.inference_mode():
            done = self._model.generate(
                input_ids=ids, attention_mask=mask, stopping_criteria=[stopping], **settings, **self._choice(requests)
            )
        seconds = time.perf_counter() - began
        return [row(each, firsts[0], seconds) for each in done[:, longest:].tolist()]

    def _choice(self, requests: Rows) -> dict[str, Any]:
        assert not any(each["adapter"] for each in requests)
        return {}


class Peft(Transformers):
    """PEFT's mixed batch: the same `generate` with an adapter's name for each row."""

    def __init__(self, plan: Plan) -> None:
        import peft

        super().__init__(plan)
        (first, folder), *others = plan["adapters"].items()
        # Without the cast adapters stay in the base's dtype, which is the faster way.
        model = peft.PeftModel.from_pretrained(self._model, folder, adapter_name=first, autocast_adapter_dtype=False)
        for name, folder in others:
            model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
        self._model = model.eval()
        self.facts |= {"version": peft.__version__}

    def _choice(self, requests: Rows) -> dict[str, Any]:
        return {"adapter_names": [each["adapter"] or "__base__" for each in requests]}


class Bandwidth:
    """No engine: reads memory as fast as it can, which is what the floor is counted from."""

    def __init__(self, plan: Plan) -> None:
        import torch

        torch.set_num_threads(plan["threads"])
        self._block = torch.ones(plan["bandwidth_bytes"] // 4)
        self.facts = {"torch": torch.__version__}

    def run(self, requests: Rows, max_new_tokens: int) -> Rows:
        """Return one row, whose `seconds` are those of the fastest of several readings of the block."""
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            self._block.sum()
            seconds.append(time.perf_counter() - began)
        return [row([], min(seconds), min(seconds))]


def row(token_ids: Any, first_token_seconds: float, seconds: float) -> dict[str, Any]:
    """Return an answer as it goes over the pipe."""
    return {"token_ids": list(token_ids), "first_token_seconds": first_token_seconds, "seconds": seconds}


MAKERS: dict[str, Callable[[Plan], Any]] = {
    "luthier": Luthier,
    "vllm": lambda plan: Vllm(plan, lora=True),
    "vllm_base": lambda plan: Vllm(plan, lora=False),
    "peft": Peft,
    "transformers": Transformers,
    "bandwidth": Bandwidth,
}
