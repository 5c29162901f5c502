"""The log: one JSON object on a line for each request and for each event worth telling. No prompts unless asked for, never a key.

A request's line has who asked (tenant, and the key by its name), what answered (model, version), how it ended and what it took.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import IO, Any

from luthier.registry.tenancy import KEY_MARK, SHOWN
from luthier.serve.observing import Observed

requests = logging.getLogger("luthier.serve.requests")

_KEY = re.compile(rf"({re.escape(KEY_MARK)}[A-Za-z0-9_-]{{{SHOWN - len(KEY_MARK)}}})[A-Za-z0-9_-]{{10,}}")


class JsonLines(logging.Formatter):
    """One line for each record: time, level, message, and what a record has in `fields`. Keys are cut to the part that is shown.

    `secrets` are blotted out wherever they stand, as a net below the rule that nothing logs them.
    """

    def __init__(self, secrets: Iterable[str] = ()):
        super().__init__()
        self._secrets = tuple(each for each in secrets if each)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "from": record.name,
            "message": record.getMessage(),
        }
        told |= getattr(record, "fields", {})
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        line = json.dumps(told, ensure_ascii=False, default=str)
        for secret in self._secrets:
            line = line.replace(secret, "[secret]")
        return _KEY.sub(r"\1...", line)


def log_to(stream: IO[str], secrets: Iterable[str] = ()) -> None:
    """Write luthier's and uvicorn's records to a stream, as JSON lines, from INFO on."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines(secrets))
    for name, level in (("luthier", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def log_request(notes: Observed, decode: Callable[[tuple[int, ...]], str] | None = None) -> None:
    """Write a request's line. With `decode` (token ids to text) it has what was kept of prompts and answers, too."""
    if not requests.isEnabledFor(logging.INFO):
        return
    answers, caller = notes.answers, notes.caller
    firsts = [each.first_token_seconds for each in answers if each.first_token_seconds is not None]
    fields: dict[str, Any] = {
        "id": notes.id,
        "method": notes.method,
        "route": notes.route,
        "status": notes.status,
        "error": notes.error,
        "tenant": None if caller is None else caller.tenant,
        "key": None if caller is None else caller.key,
        "model": notes.model,
        "version": answers[0].adapter if answers else None,
        "prompt_tokens": sum(each.prompt_tokens for each in answers),
        "cached_tokens": sum(each.cached_tokens for each in answers),
        "new_tokens": sum(each.new_tokens for each in answers),
        "finish_reasons": [each.finish_reason for each in answers],
        "first_token_seconds": round(min(firsts), 4) if firsts else None,
        "seconds": round(notes.seconds, 4),
    }
    if decode is not None:
        fields["prompts"] = [decode(each.prompt_ids) for each in answers]
        fields["answers"] = ["".join(each.texts) for each in answers]
    requests.info("request", extra={"fields": fields})
