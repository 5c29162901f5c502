"""The bodies of /v1/chat/completions: a conversation with tools in, messages and calls out."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from luthier.serve.bodies import Asked, Body, Text, Usage

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class TextPart(Body):
    """A piece of a message; other kinds (images, sound, files) are refused."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError(
                "refused", "Parts of type '{key}' are not supported: messages are text.", {"key": kind[:100]}
            )
        return given


Content = str | Annotated[list[TextPart], Field(min_length=1)]


class CalledFunction(Body):
    """Which function, and its arguments as JSON."""

    name: FunctionName
    arguments: str


class ToolCall(Body):
    """A call that the assistant made in an earlier turn."""

    id: Text
    type: Literal["function"]
    function: CalledFunction


class SystemMessage(Body):
    """What holds for the whole conversation."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Body):
    """What the model said, with the calls that it made."""

    refused: ClassVar[dict[str, str]] = dict.fromkeys(("audio", "function_call", "refusal"), "no answer of this server's has it")

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1)] | None = None
    name: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    refusal: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.tool_calls is None:
            raise ValueError("a message of the assistant needs content or tool_calls")
        return self


class ToolMessage(Body):
    """What a call gave."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Text
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class FunctionDefinition(Body):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON schema of the arguments; without it there are none")
    strict: bool | None = Field(default=None, description="hold the arguments to their schema where the model calls by itself")

    @model_validator(mode="after")
    def _takes_an_object(self) -> Self:
        if self.parameters is not None and self.parameters.get("type", "object") != "object":
            raise ValueError(f"the parameters of function {self.name!r} need a schema of type 'object'")
        return self


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Body):
    """A function by its name."""

    name: FunctionName


class NamedTool(Body):
    """A tool by its name: this one has to be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    """Those of the tools that may be called, and whether one has to be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedChoice(Body):
    """A part of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaDefinition(Body):
    """A JSON schema. Answers are held to it whatever `strict` says."""

    name: FunctionName
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class SchemaFormat(Body):
    """JSON that a schema accepts."""

    type: Literal["json_schema"]
    json_schema: SchemaDefinition


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class ChatBody(Asked):
    """A chat that waits for its answer."""

    refused: ClassVar[dict[str, str]] = {
        "audio": "answers are text",
        "function_call": "it is OpenAI's old way to call functions; write tool_choice",
        "functions": "it is OpenAI's old way to call functions; write tools",
        "moderation": "nothing is moderated here",
        "prediction": "no answer is predicted",
        "prompt_cache_options": "what is kept of prompts is set for the whole server",
        "web_search_options": "there is no search here; give the model a tool",
    }

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31, description="the answer is cut off after so many")
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31, description="older name of max_completion_tokens")
    logprobs: bool | None = Field(default=None, description="log-probabilities of the answer's tokens")
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="and of so many likeliest tokens in each place")
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedChoice | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="false: at most one call in an answer")
    metadata: dict[str, str] | None = Field(default=None, description="taken and not kept")
    store: Literal[False] | None = Field(default=None, description="answers are not kept")
    service_tier: Literal["auto", "default"] | None = Field(default=None, description="there is one tier")
    safety_identifier: str | None = Field(default=None, description="newer name of user")
    prompt_cache_key: str | None = Field(default=None, description="a hint; beginnings of prompts are found without it")
    prompt_cache_retention: Literal["in_memory"] | None = Field(default=None, description="they are kept in memory")
    modalities: Annotated[list[Literal["text"]], Field(min_length=1)] | None = Field(default=None, description="text alone")
    reasoning_effort: Literal["none"] | None = Field(default=None, description="no model is told how long to think")
    verbosity: Literal["medium"] | None = Field(default=None, description="no model is told how much to say")
    audio: None = None
    function_call: None = None
    functions: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_options: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are one thing and differ; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs has no effect without logprobs=true")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice asks for a call, and there are no tools")
        names = [tool.function.name for tool in self.tools or ()]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"tools has two functions of the name {', '.join(sorted(twice))}")
        unknown = [name for name in self.chosen_names or () if name not in names]
        if unknown:
            raise ValueError(f"tool_choice names {', '.join(unknown)}, which is not among the tools: {', '.join(names)}")
        if self.structured_outputs is not None and (self.tools or self.response_format is not None):
            raise ValueError("structured_outputs does not go together with response_format or tools; give one of them")
        return self

    @property
    def chosen_names(self) -> list[str] | None:
        """The functions that tool_choice leaves, None for all."""
        if isinstance(self.tool_choice, NamedTool):
            return [self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedChoice):
            return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        return None

    @property
    def usable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        if self.tool_choice == "none":
            return []
        names = self.chosen_names
        return [tool for tool in self.tools or () if names is None or tool.function.name in names]

    @property
    def has_to_call(self) -> bool:
        """Whether the answer must be a call."""
        if isinstance(self.tool_choice, AllowedChoice):
            return self.tool_choice.allowed_tools.mode == "required"
        return isinstance(self.tool_choice, NamedTool) or self.tool_choice == "required"


# --- answers --------------------------------------------------------------------------------------------------------


class LikelyToken(BaseModel):
    """A token with its log-probability (nats); `bytes` are those of its text."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenInPlace(LikelyToken):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    """Log-probabilities of all tokens of a message."""

    content: list[TokenInPlace] | None
    refusal: None = None


class FunctionOfCall(BaseModel):
    """What is called; `arguments` is JSON, unless the answer was cut off within."""

    name: str | None = None
    arguments: str


class CallOfAnswer(BaseModel):
    """A call that the model makes."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionOfCall


class AnswerMessage(BaseModel):
    """The assistant's answer: text, calls, or both."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[CallOfAnswer] | None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The answers to a chat."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    service_tier: Literal["default"] = "default"
