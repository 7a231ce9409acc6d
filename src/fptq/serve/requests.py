"""What clients of OpenAI's API send, as https://platform.openai.com/docs/api-reference describes it, and its errors.

What the engine can't do is refused, and never ignored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fptq.errors import BusyError, FPTQError, GenerationError, TimeLimitError, TokenizerError
from fptq.runtime.engine import Engine
from fptq.runtime.sampling import Sampling
from fptq.runtime.tokenizer import Tokenizer, read_json
from fptq.runtime.writing import Text
from fptq.serve.replies import JSON, ChatReply, CompletionReply, Reply

_WITHOUT_EFFECT = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
}
"""What concerns OpenAI's own service; any value is taken."""

_ONLY_OFF: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
}
"""What the engine doesn't do, with the values that don't ask for it."""


USUAL_TEMPERATURE = 0.7
"""Where neither client nor model say one; `fptq chat` has the same."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(folder: Path) -> JSON:
    """Return how tokens are chosen where a client doesn't say: as in the model's generation_config.json.

    Raises:
        GenerationError: a value there is out of range.
        TokenizerError: the file isn't JSON.
    """
    path = folder / "generation_config.json"
    found = read_json(path)
    defaults = {"temperature": USUAL_TEMPERATURE} | {n: found[n] for n in _SAMPLING if found.get(n) is not None}
    try:
        _sampling(defaults)
    except GenerationError as cause:
        raise GenerationError(f"{path}: {cause}") from cause
    return defaults


def _sampling(values: JSON, **more: Any) -> Sampling:
    """Return a way to choose; temperature 0 leaves no choice that other values could limit."""
    if values["temperature"] == 0:
        values = {name: value for name, value in values.items() if name not in ("top_p", "top_k", "min_p")}
    return Sampling(**values, **more)


_T = TypeVar("_T")
_Prompts: TypeAlias = Annotated[list[_T], Field(max_length=1000)]


class APIError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: of HTTP.
        message: for the user.
        kind: OpenAI's "type".
        param: the parameter that it is about.
        code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code

    @classmethod
    def of(cls, error: FPTQError) -> APIError:
        """Return what a client is told of an error of ours."""
        if isinstance(error, BusyError):
            return cls(503, str(error), "overloaded_error", code="overloaded")
        if isinstance(error, TimeLimitError):
            return cls(504, str(error), "timeout_error", code="time_limit")
        if isinstance(error, GenerationError | TokenizerError):
            return cls(400, str(error))
        return cls(500, str(error), "server_error", code="engine_error")

    def to_dict(self) -> JSON:
        """Return the body of the response."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """What else a stream has."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False  # only ever adds noise, and may be left out


class Request(BaseModel, ABC):
    """What both kinds of requests have; top_k, min_p and repetition_penalty are named as in vLLM."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[Annotated[int, Field(ge=0, strict=False)], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=1000),
    ] = {}
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        """Leave out what is null, has no effect, or asks for nothing."""
        if not isinstance(values, dict):
            return values
        off = {name for name, allowed in _ONLY_OFF.items() if values.get(name) in allowed}
        return {
            name: value
            for name, value in values.items()
            if value is not None and name not in _WITHOUT_EFFECT and name not in off
        }

    @classmethod
    def read(cls, body: bytes) -> Any:
        """Return the request in a body of JSON.

        Raises:
            APIError: it isn't one.
        """
        try:
            return cls.model_validate_json(body)
        except ValidationError as cause:
            errors = cause.errors(include_url=False, include_context=False)
        # of a value that may have several types: what is wrong with it in the one that it has
        first = next((error for error in errors if not error["type"].endswith("_type")), errors[0])
        if first["type"] == "json_invalid":
            raise APIError(400, f"the body isn't JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
        path = [str(step) for step in first["loc"]]
        param = path[0] if path else None
        if param in ("prompt", "stop"):
            path = path[:1]  # then come names of types
        message = f"{'.'.join(path)}: {first['msg']}" if path else first["msg"]
        if first["type"] == "extra_forbidden":
            known = param in _ONLY_OFF
            message = f"'{'.'.join(path)}' {'is not supported by this server' if known else 'is no known parameter'}"
        raise APIError(400, message, param=param, code="unsupported_parameter" if param in _ONLY_OFF else None)

    @property
    def stops(self) -> list[str]:
        """The strings at which a text ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def sampling(self, index: int, defaults: JSON) -> Sampling:
        """Return how the tokens of one of the `n` texts are chosen."""
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        values = {**defaults, **given}
        return _sampling(
            {**values, "top_k": max(0, values.get("top_k", 0))},  # -1 means all, too
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias,
            seed=None if self.seed is None else (self.seed + index) % 2**64,
        )

    def texts(
        self, engine: Engine, defaults: JSON, *, most_prompt: int, most_new: int | None, most_texts: int
    ) -> list[Text]:
        """Return the texts to be written, by index.

        Args:
            engine: that writes them.
            defaults: of `sampling_defaults`.
            most_prompt: tokens that a prompt may have.
            most_new: tokens that an answer may have; None: what the context leaves.
            most_texts: answers that one request may ask for.

        Raises:
            APIError: a prompt or an answer is too long, or there are too many.
            GenerationError: a prompt is empty, or has ids that aren't in the vocabulary.
            TokenizerError: the model has no chat template, or it refuses the messages.
        """
        prompts = self.prompts(engine)
        if not prompts:
            raise APIError(400, "there is no prompt", param=self.prompt_name)
        if len(prompts) * self.n > most_texts:
            raise APIError(400, f"{len(prompts) * self.n} answers were asked for: at most {most_texts} are possible")
        wanted = self.most_tokens()
        for ids in prompts:
            if len(ids) > most_prompt or len(ids) + (wanted or 1) > engine.context:
                new = "" if wanted is None else f", with {wanted} new tokens"
                raise APIError(
                    400,
                    f"the prompt has {len(ids)} tokens{new}: a prompt may have {most_prompt}, and both together "
                    f"{engine.context} (the context)",
                    param=self.prompt_name,
                    code="context_length_exceeded",
                )
        if wanted is not None and most_new is not None and wanted > most_new:
            raise APIError(400, f"max_tokens {wanted}: at most {most_new} are allowed here", param="max_tokens")
        write = partial(
            engine.text, max_new_tokens=wanted or most_new, stop=self.stops, log_probabilities=self.alternatives()
        )
        return [write(ids, sampling=self.sampling(i, defaults)) for ids in prompts for i in range(self.n)]

    prompt_name: ClassVar[str]

    @abstractmethod
    def prompts(self, engine: Engine) -> list[list[int]]:
        """Return the tokens of each prompt."""

    @abstractmethod
    def most_tokens(self) -> int | None:
        """Return how many tokens an answer may have; None: what there is room for."""

    @abstractmethod
    def alternatives(self) -> int | None:
        """Return how many likeliest tokens are told beside the chosen one; None: no log-probabilities at all."""

    @abstractmethod
    def reply(self, model: str, tokenizer: Tokenizer) -> Reply:
        """Return how the answer is written."""


class CompletionRequest(Request):
    """A body for /v1/completions."""

    prompt_name = "prompt"
    prompt: str | _Prompts[str] | list[int] | _Prompts[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self, engine: Engine) -> list[list[int]]:
        """Return the tokens of each prompt."""
        given: Sequence[Any] = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if given and isinstance(given[0], int):
            given = [given]
        tokenizer = engine.tokenizer
        assert tokenizer is not None
        return [tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in given]

    def most_tokens(self) -> int | None:
        """Return how many tokens an answer may have."""
        return self.max_tokens

    def alternatives(self) -> int | None:
        """Return how many likeliest tokens are told beside the chosen one."""
        return self.logprobs

    def reply(self, model: str, tokenizer: Tokenizer) -> Reply:
        """Return how the answer is written."""
        return CompletionReply(model, tokenizer, self.n)


class Part(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """What somebody said."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: None = None
    tool_call_id: str | None = None

    def to_dict(self) -> JSON:
        """Return it as chat templates take it: one text, and no developers, whom open models don't know."""
        content = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content or ""}


class ChatRequest(Request):
    """A body for /v1/chat/completions; chat_template_kwargs as in vLLM."""

    prompt_name = "messages"
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    chat_template_kwargs: Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    def prompts(self, engine: Engine) -> list[list[int]]:
        """Return the tokens of the conversation."""
        assert engine.tokenizer is not None
        reserved = {"messages", "tools", "continue_final"} & self.chat_template_kwargs.keys()
        if reserved:
            message = f"chat_template_kwargs: '{min(reserved)}' is none of the template's own variables"
            raise APIError(400, message, param="chat_template_kwargs")
        messages = [message.to_dict() for message in self.messages]
        return [engine.tokenizer.chat(messages, **self.chat_template_kwargs)]

    def most_tokens(self) -> int | None:
        """Return how many tokens an answer may have; None: what there is room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def alternatives(self) -> int | None:
        """Return how many likeliest tokens are told beside the chosen one."""
        return self.top_logprobs if self.logprobs else None

    def reply(self, model: str, tokenizer: Tokenizer) -> Reply:
        """Return how the answer is written."""
        return ChatReply(model, tokenizer, self.n)
