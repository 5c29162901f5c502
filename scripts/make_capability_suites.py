"""Write the rows of the general-capability suites that come from templates: grammar, arithmetic, formats, facts.

    python scripts/make_capability_suites.py            writes src/luthier/evaluate/suite_data/*.jsonl
    python scripts/make_capability_suites.py --out DIR  writes them to DIR instead

Lexicons, sentences and facts were written by hand for this project (`scripts/capability/`, a file each). The same script
gives the same bytes on every machine, so that the suites' digests hold still. The rows of `refusals` and `neutral` were
written one by one and have no script. This file never reads a model, a tokenizer or the network.
"""

import argparse
import json
from pathlib import Path

from capability.arithmetic import arithmetic
from capability.facts import facts
from capability.formats import formats
from capability.grammar import grammar

SHIPPED = Path(__file__).resolve().parents[1] / "src/luthier/evaluate/suite_data"


def main() -> None:
    """Write one file per suite."""
    parser = argparse.ArgumentParser(description="Write the rows of the general-capability suites.")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder to write to")
    out = parser.parse_args().out
    for make in (grammar, arithmetic, formats, facts):
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in make())
        (out / f"{make.__name__}.jsonl").write_bytes("".join(lines).encode())


if __name__ == "__main__":
    main()
