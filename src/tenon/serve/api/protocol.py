"""The bodies of OpenAI's API that this server reads, field by field.

Fields that OpenAI knows and that change nothing here are taken and have no effect; unknown ones are refused. This
module does not know how requests are answered.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tenon.data.messages import BadRowError, canonical_messages

MOST_STOPS = 16
MOST_SEQUENCES = 128
MOST_TOP_LOGPROBS = 20
MOST_FIELDS = 1024
MOST_TOOLS = 128
_SEEDS = 2**63
# What response_format: json_object stands for.
ANY_OBJECT: dict[str, Any] = {"type": "object"}


def _whole(text: str) -> str:
    """Refuse halves of characters (lone surrogates), which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text", "the text is not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
StopText = Annotated[Text, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0)]
TokenIdText = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,8})$")]
FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
_T = TypeVar("_T")
# A list is refused at its first fault: a body of a few megabytes can have a million, and each would be told.
Each = Annotated[list[_T], Field(fail_fast=True)]
Several = Annotated[list[_T], Field(min_length=1, fail_fast=True)]


def _few_fields(value: Any) -> Any:
    """Refuse objects of very many fields before each of them is looked at."""
    if isinstance(value, dict) and len(value) > MOST_FIELDS:
        raise PydanticCustomError("too_many_fields", "an object has at most {most} fields", {"most": MOST_FIELDS})
    return value


ByName = Annotated[dict[str, _T], BeforeValidator(_few_fields)]
_Biases = Annotated[dict[TokenIdText, Bias], BeforeValidator(_few_fields)]


class ApiModel(BaseModel):
    """A JSON object of the API: no unknown field, no number in quotes."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _bound_fields(cls, value: Any) -> Any:
        return _few_fields(value)


class StreamOptions(ApiModel):
    """include_usage: a last chunk with the number of tokens. include_obfuscation: no effect here."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(ApiModel):
    """A piece of a message's text."""

    type: Literal["text"]
    text: Text


class ChatMessage(ApiModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Each[TextPart] | None = None
    name: Text | None = None
    reasoning_content: Text | None = None
    tool_calls: Each[dict[str, Any]] | None = None
    tool_call_id: Text | None = None
    refusal: Text | None = None

    @field_validator("tool_calls")
    @classmethod
    def _as_templates_read_calls(cls, calls: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """Arguments as objects, as in the rows of a data set."""
        if not calls:
            return None
        try:
            _whole(json.dumps(calls, ensure_ascii=False))
            ((message,), _) = canonical_messages([{"role": "assistant", "tool_calls": calls}], sharegpt=False)
        except BadRowError as error:
            raise PydanticCustomError("tool_calls", "{reason}", {"reason": error.reason}) from error
        return message["tool_calls"]

    def plain(self) -> dict[str, Any]:
        """As chat templates read it: text in one piece, nothing that is null."""
        message = self.model_dump(exclude_none=True, exclude={"refusal"})
        if isinstance(self.content, list):
            message["content"] = "".join(part.text for part in self.content)
        message.setdefault("content", "")
        return message


class _Asked(ApiModel):
    """What both kinds of requests have."""

    model: Text
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-_SEEDS, lt=_SEEDS)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_SEQUENCES)] | None = None
    ignore_eos: bool = False
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: _Biases | None = None
    # Of an alias of several versions a user is dealt the same one every time.
    user: Text | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a list."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """What is added to the score of which token id."""
        return tuple((int(token), value) for token, value in (self.logit_bias or {}).items())

    @model_validator(mode="after")
    def _refuse_options_of_no_stream(self) -> _Asked:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream: true")
        return self


class TextFormat(ApiModel):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(ApiModel):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(ApiModel):
    """A JSON schema. It is kept whether `strict` is set or not."""

    name: FunctionName
    description: Text | None = None
    json_schema: ByName[Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(ApiModel):
    """The JSON that a schema allows."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class FunctionDefinition(ApiModel):
    """A function that the model may call. parameters: the JSON schema of its arguments. strict: they are held to it."""

    name: FunctionName
    description: Text | None = None
    parameters: ByName[Any] | None = None
    strict: bool | None = None


class FunctionTool(ApiModel):
    """A tool: a function."""

    type: Literal["function"]
    function: FunctionDefinition

    def told(self) -> dict[str, Any]:
        """As chat templates read it."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})

    @model_validator(mode="after")
    def _refuse_halves_of_characters(self) -> FunctionTool:
        _whole(json.dumps(self.function.parameters, ensure_ascii=False))
        return self


class FunctionByName(ApiModel):
    """A function of the request's."""

    name: FunctionName


class NamedTool(ApiModel):
    """The function that is to be called."""

    type: Literal["function"]
    function: FunctionByName


class ChatRequest(_Asked):
    """POST /v1/chat/completions."""

    messages: Several[ChatMessage]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    # Without effect here.
    metadata: ByName[str] | None = None
    store: bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def most_tokens(self) -> int | None:
        """The longest answer; None: to the end of the context."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """The JSON schema that the answer is held to; None: any text."""
        if isinstance(self.response_format, JsonSchemaFormat):
            return self.response_format.json_schema.json_schema or {}
        return ANY_OBJECT if isinstance(self.response_format, JsonObjectFormat) else None

    @model_validator(mode="after")
    def _refuse_what_contradicts(self) -> ChatRequest:
        if self.ignore_eos and (self.schema_asked is not None or self.tools):
            raise PydanticCustomError("ignore_eos", "ignore_eos does not go with response_format or tools")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise PydanticCustomError("tool_choice", "tool_choice needs tools")
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs: true")
        return self


class CompletionRequest(_Asked):
    """POST /v1/completions. prompt: a text or token ids, or several. logprobs: how many of the likeliest tokens."""

    prompt: Text | Several[Text] | Several[TokenId] | Several[Several[TokenId]]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _refuse_what_makes_no_sense(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "max_tokens: 0 needs echo: true, or there is nothing to answer")
        if self.stream and self.echo and self.logprobs is not None:
            raise PydanticCustomError("stream", "echo with logprobs comes in one piece: leave stream out")
        return self


class ErrorDetail(BaseModel):
    """What is wrong. type and code: for programs; param: the field that is to blame."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail
