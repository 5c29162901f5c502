"""Jinja templates that build a text from a row's columns. Never the chat template: that belongs to the tokenizer."""

import json
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import SandboxedEnvironment

from luthier.core.errors import ConfigError, did_you_mean


def _tojson(value: Any, indent: int | None = None) -> str:
    """JSON as a model should learn it: keys in the row's order, letters as they are.

    Jinja's own filter sorts the keys and writes <, > and & as escapes, for web pages.
    """
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _environment() -> SandboxedEnvironment:
    # Templates may come with a recipe from elsewhere, hence the sandbox; a missing column must not become "".
    jinja = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    jinja.filters["tojson"] = _tojson
    return jinja


class RowTemplate:
    """One template, compiled once. Raises: ConfigError where its syntax is wrong."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        jinja = _environment()
        try:
            self._columns = jinja2.meta.find_undeclared_variables(jinja.parse(source))
            self._template = jinja.from_string(source)
        except jinja2.TemplateSyntaxError as fault:
            raise ConfigError(f"{name} is not a valid Jinja template, line {fault.lineno}: {fault.message}") from None

    def render(self, row: Mapping[str, Any]) -> str:
        """Return the text for one row. Raises: ValueError with words that follow "row 17"."""
        try:
            return self._template.render(row)
        except jinja2.UndefinedError as fault:
            missing = sorted(self._columns - set(row))
            if not missing:
                raise ValueError(f"does not suit {self.name}: {fault.message}") from None
            hints = "".join(did_you_mean(column, row) for column in missing)
            has = ", ".join(map(repr, row))
            raise ValueError(f"has no {', '.join(map(repr, missing))}, which {self.name} uses.{hints} It has {has}.") from None
        except Exception as fault:  # a template can do anything wrong that an expression can
            raise ValueError(f"does not suit {self.name}: {type(fault).__name__}: {fault}") from None
