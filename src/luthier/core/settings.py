"""Frozen, strict settings: an unknown key or an impossible value is an error that names every fault and the near misses."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from luthier.core.errors import ConfigError, did_you_mean


class Settings(BaseModel):
    """A pydantic model that forbids unknown keys, cannot be changed, and raises ConfigError."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(_explain(error, type(self))) from None

    def changed(self, **values: Any) -> "Settings":
        """Return a copy with some values replaced, validated like a new one."""
        return type(self)(**(dict(self) | values))


def _explain(error: ValidationError, settings: type[BaseModel]) -> str:
    faults = []
    for fault in error.errors(include_url=False):
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = settings.model_fields
            faults.append(f"unknown key '{where}'.{did_you_mean(where.split('.')[-1], known)} Known: {', '.join(known)}")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            faults.append(f"{where}: {message} (given: {fault['input']!r})" if where else message)
    return f"{settings.__name__} has {len(faults)} fault(s):\n" + "\n".join(f"  {fault}" for fault in faults)
