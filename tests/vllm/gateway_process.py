"""A gateway's process for the test that kills it: starts vLLM, tells the keeper's pid, and waits."""

import asyncio
import json
import sys
from pathlib import Path

from luthier.serve.vllm import VllmSettings
from luthier.serve.vllm.supervisor import Supervisor


async def main(told: dict) -> None:
    """Start vLLM and stay."""
    supervisor = Supervisor(Path(told["base"]), VllmSettings(**told["settings"]), max_rank=16, registry=told["registry"])
    await supervisor.start()
    found = {"keeper": supervisor.pid, "network": supervisor.network, "folder": str(supervisor.place.folder)}
    print(json.dumps(found), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
