"""Frozen, strict settings: an unknown key or an impossible value is an error that names every fault and the near misses."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from luthier.core.errors import ConfigError, did_you_mean

# What other tools call the same thing, where no likeness of letters would find it.
SYNONYMS = {
    "alpha": "lora_alpha",
    "batch_size": "batch_rows",
    "dropout": "lora_dropout",
    "gradient_accumulation_steps": "accumulate",
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "rank": "r",
}


class Settings(BaseModel):
    """A pydantic model that forbids unknown keys, cannot be changed, and raises ConfigError."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            faults = _faults(error, type(self))
            listed = "\n".join(f"  {fault}" for fault in faults)
            raise ConfigError(f"{type(self).__name__} has {len(faults)} fault(s):\n{listed}", faults) from None

    def changed(self, **values: Any) -> Self:
        """Return a copy with some values replaced, validated like a new one."""
        return type(self)(**(dict(self) | values))


def _faults(error: ValidationError, settings: type[BaseModel]) -> list[str]:
    found: list[str] = []
    for fault in error.errors(include_url=False):
        where = ".".join(str(part) for part in fault["loc"])
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            found += [f"[{where}] {inner}" if where else inner for inner in cause.faults or [str(cause)]]
        elif fault["type"] == "extra_forbidden":
            known = settings.model_fields
            meant = f" Did you mean '{SYNONYMS[where]}'?" if SYNONYMS.get(where) in known else did_you_mean(where, known)
            found.append(f"unknown key '{where}'.{meant} Known: {', '.join(known)}")
        elif fault["type"] == "missing":
            found.append(f"{where} is missing: {settings.model_fields[where].description}")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            found.append(f"{where}: {message} (given: {fault['input']!r})" if where else message)
    return found
