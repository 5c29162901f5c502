"""A program in vLLM's place for the supervisor's tests: it has vLLM's command line and a /health, and ends as it is told.

Written into a script that is called as vLLM's python is: with `-c` it answers what is installed, else it serves.
"""

import os
import sys
from pathlib import Path

SCRIPT = """#!{python}
import json, os, sys, time
if sys.argv[1] == "-c":
    print(json.dumps({probe}))
    sys.exit()
assert sys.argv[1:3] == ["-m", "vllm.entrypoints.openai.api_server"], sys.argv
folder = os.path.dirname({script!r})
with open(folder + "/starts", "a") as file:
    file.write(json.dumps({{"argv": sys.argv, "pid": os.getpid(), "environ": dict(os.environ)}}) + "\\n")
print("Loading safetensors checkpoint shards:  50% Completed", flush=True)
if os.path.exists(folder + "/broken"):
    print("RuntimeError: no room for the KV cache", flush=True)
    sys.exit(1)
import uvicorn
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return
    ok = dict(scope["headers"]).get(b"authorization") == b"Bearer " + os.environ["VLLM_API_KEY"].encode()
    while os.path.exists(folder + "/stuck"):
        time.sleep(0.05)
    await send({{"type": "http.response.start", "status": 200 if ok else 401, "headers": []}})
    await send({{"type": "http.response.body", "body": b""}})
uvicorn.run(app, uds=sys.argv[sys.argv.index("--uds") + 1], lifespan="off", log_level="warning")
"""


def write_stand_in(folder: Path, **found: object) -> Path:
    """Write the program and return its path. `found` changes what it says is installed."""
    probe = {"version": "0.32.0", "cpu": True, "plugin": True} | found
    script = folder / "python"
    script.write_text(SCRIPT.format(python=sys.executable, probe=probe, script=str(script)))
    os.chmod(script, 0o755)
    return script
