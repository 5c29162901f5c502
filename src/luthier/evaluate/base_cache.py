"""What a base scored before, so that ten adapters of one base cost one run of it: JSON files under the user's cache.

    $LUTHIER_HOME/scores/<key>.json      {"key": {...}, "digest": sha256 of the scores, "scores": {...}}

The key names all that the scores depend on: the base's weights (fingerprint), precision and quantisation, tokenizer with its chat
template, the suite's digest (definition, data, harness), the batch size, which in bfloat16 can decide between two near equals,
and for answers whether an engine gave them.
A file that is damaged is told in the log and counts as absent. Files hold the base's answers; delete the folder to forget them.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from luthier.core.atomic import write_atomic
from luthier.core.errors import DataError, LuthierError
from luthier.evaluate.scores import SuiteScores
from luthier.evaluate.suites import HARNESS, Suite

log = logging.getLogger("luthier.evaluate")


class BaseScores:
    """The kept scores of one base, whatever adapter is on it. `is_served`: an engine answers in its place."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path | None = None, *, is_served: bool = False) -> None:
        from luthier.formats.adapters import fingerprint_of
        from luthier.models.cache import luthier_home

        self._folder = folder or luthier_home() / "scores"
        self._is_served = is_served
        found = fingerprint_of(model)
        self._base = {
            "base": found.identity(),
            "quantisation": found.quantisation,
            "dtype": str(model.dtype),
            "device": model.device.type,
            "tokenizer": _tokenizer_digest(tokenizer),
        }

    def find(self, suite: Suite, batch_tokens: int) -> SuiteScores | None:
        """Return what this base scored on the suite, or None. A damaged file is told in the log."""
        path = self._path(suite, batch_tokens)
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["key"] != self._key(suite, batch_tokens) or known["digest"] != _digest(known["scores"]):
                raise DataError("its digest is not that of its content")
            scores = SuiteScores.from_dict(known["scores"])
            if [item.id for item in scores.items] != [item.id for item in suite.items]:
                raise DataError("its items are not those of the suite")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, LuthierError) as fault:
            log.warning("The kept scores in %s are damaged (%s); the base is run again.", path, fault)
            return None
        return scores

    def keep(self, suite: Suite, batch_tokens: int, scores: SuiteScores) -> None:
        """Put scores where `find` finds them, whole or not at all. Raises: StorageError."""
        plain = scores.as_dict()
        kept = {"key": self._key(suite, batch_tokens), "digest": _digest(plain), "scores": plain}
        write_atomic(self._path(suite, batch_tokens), json.dumps(kept, ensure_ascii=False))

    def _key(self, suite: Suite, batch_tokens: int) -> dict[str, Any]:
        key = {**self._base, "suite": suite.digest, "harness": HARNESS, "batch_tokens": batch_tokens}
        return key | ({"answers": "engine"} if self._is_served and suite.definition.type == "generate" else {})

    def _path(self, suite: Suite, batch_tokens: int) -> Path:
        return self._folder / f"{_digest(self._key(suite, batch_tokens))}.json"


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _digest([said, tokenizer.chat_template, specials])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
