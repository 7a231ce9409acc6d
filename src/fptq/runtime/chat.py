"""A model's chat template: the program that writes a conversation as the text that the model was trained on.

It is a Jinja template out of a checkpoint, so it runs in a sandbox, with what transformers gives to templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from fptq.errors import TokenizerError

_OPENING = "THE MESSAGE GOES ON HERE "


class ChatTemplate:
    """The templates of a model by name: "default", and perhaps "tool_use" for conversations with tools."""

    def __init__(self, sources: dict[str, str]):
        self._sources = sources

    @cached_property
    def _templates(self) -> dict[str, Any]:
        return {name: _compile(source) for name, source in self._sources.items()}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        continue_final: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """Return a conversation as a text for the model to go on: with an answer, or with the last message.

        Raises:
            TokenizerError: the template is damaged or refuses the messages, or they aren't messages.
        """
        template = self._templates["tool_use" if tools and "tool_use" in self._sources else "default"]
        try:
            plain = json.loads(json.dumps(messages))
            chat = [{key: value for key, value in message.items() if value is not None} for message in plain]
            if continue_final:
                chat[-1]["content"] += _OPENING
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as cause:
            needed = 'a list of {"role": …, "content": …} with JSON values'
            needed += ", the last with a text to continue" if continue_final else ""
            raise TokenizerError(f"messages {messages!r:.200}: needed {needed}") from cause
        if not chat:
            raise TokenizerError("the conversation has no messages; needed at least one")
        values = {"tools": tools, "documents": None, "add_generation_prompt": not continue_final, **variables}
        try:
            text = template.render(messages=chat, **values)
        # a template is a program, and may fail in any way
        except Exception as cause:
            raise TokenizerError(f"the chat template refuses the messages: {cause}") from cause
        return _up_to_opening(text) if continue_final else text


def _up_to_opening(text: str) -> str:
    """Return a rendered conversation up to the mark that ends its last message's content."""
    at = text.rfind(_OPENING.strip())
    if at < 0:
        raise TokenizerError("the chat template leaves out the last message, so it can't be continued")
    # a template that strips the content also strips the space at the end of the mark
    return text[:at] if text.startswith(_OPENING, at) else text[:at].rstrip()


def _compile(source: str) -> Any:
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Reads through `{% generation %}`, which marks answers for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:  # jinja2's own escapes for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as cause:
        raise TokenizerError(f"the chat template can't be read: {cause}") from cause
