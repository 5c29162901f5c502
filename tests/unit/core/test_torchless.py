"""A process that is to handle text only has no torch, and its tokenizer is the same."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from luthier.core.torchless import keep_torch_out
from luthier.models.load import read_tokenizer

SCRIPT = """
import sys
from pathlib import Path
from luthier.core.torchless import keep_torch_out
assert keep_torch_out()
from luthier.models.load import read_tokenizer
tokenizer = read_tokenizer(Path(sys.argv[1]))
messages = [{"role": "user", "content": sys.argv[2]}]
print(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
print(sys.modules["torch"])
try:
    import torch
except ImportError:
    print("kept out")
"""


def test_a_tokenizer_does_without_torch(tmp_path: Path, tiny_tokenizer, root: Path) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    said = "Wie lange dauert es? 50 %"
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "TRANSFORMERS_VERBOSITY": "error"}
    words = [sys.executable, "-c", SCRIPT, str(tmp_path), said]
    run = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    messages = [{"role": "user", "content": said}]
    wanted = read_tokenizer(tmp_path).apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert run.stdout.splitlines() == [str(wanted), "None", "kept out"]


def test_what_is_there_already_stays() -> None:
    assert not keep_torch_out()
    assert sys.modules["torch"] is torch
