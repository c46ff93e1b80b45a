"""One template: the same text as transformers', in a sandbox."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from tenon.data.template import RENDER_ERRORS, ChatTemplate, Conversation, normal_messages, read_template
from tenon.errors import DataError
from tests.data.chats import DATED, MARKED

USER = {"role": "user", "content": "你好 <b> & 'x' \"y\""}

# Each line uses something that chat templates rely on.
FEATURES = (
    "{{ messages | tojson }}",
    "{{ messages[0] | tojson(indent=2) }}",
    "{{ {'b': 1, 'a': [1.5, none, true]} | tojson(separators=(',', ':'), sort_keys=true) }}",
    "{{ '你' | tojson(ensure_ascii=true) }}",
    "{% for m in messages %}\n  {% if loop.first %}\nfirst\n  {% endif %}\n{{ m.content }}\n{% endfor %}\n end",
    "{% for i in range(9) %}{% if i == 3 %}{% continue %}{% elif i > 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{{ bos_token }}|{{ eos_token }}|{{ tools }}|{{ documents }}|{{ add_generation_prompt }}|{{ nothing }}",
    "{{ tools is none }}{{ enable_thinking is defined }}{{ missing is defined }}",
    "{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ dict(k=1)['k'] }}",
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) }}{% generation %}a{{ messages[0].role }}{% endgeneration %}",
    "{% set t %}{% generation %} x {% endgeneration %}{% endset %}{{ t | trim }}{{ '=' * 5 }}{{ 2 ** 3 }}",
    "{{ messages[0].get('name', 'nobody') }}{{ messages[0].reasoning_content }}{{ messages[::-1] | length }}",
    "{{ strftime_now('%Y') }}",
)


def transformers_text(folder: Path, source: str, messages: list[dict[str, Any]], **more: Any) -> str:
    oracle = PreTrainedTokenizerFast.from_pretrained(str(folder))
    text = oracle.apply_chat_template(messages, chat_template=source, tokenize=False, **more)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("source", FEATURES)
@pytest.mark.parametrize("prompt", [True, False])
def test_p10_the_same_text_as_transformers(source: str, prompt: bool, byte_folder: Path) -> None:
    named = PreTrainedTokenizerFast.from_pretrained(str(byte_folder)).special_tokens_map
    template = ChatTemplate(source, named_tokens=named)
    tools = [{"type": "function", "function": {"name": "f", "description": "看"}}]
    documents = [{"title": "t", "text": "x"}]
    messages = [USER, {"role": "assistant", "content": None, "reasoning": "hm", "name": None}]
    for given in (None, tools):
        chat = Conversation(
            normal_messages(tuple(messages)), tools=given, documents=documents, variables={"enable_thinking": False}
        )
        expected = transformers_text(
            byte_folder,
            source,
            messages,
            tools=given,
            documents=documents,
            add_generation_prompt=prompt,
            enable_thinking=False,
        )
        assert template.render(chat, prompt=prompt) == expected


def test_messages_are_normalised_as_transformers_does(byte_folder: Path) -> None:
    messages = [
        {"role": "assistant", "content": None, "tool_calls": None, "reasoning": "a"},
        {"role": "assistant", "content": "x", "thinking": "b", "reasoning": "c"},
        {"role": "assistant", "content": "x", "reasoning_content": "d", "thinking": None},
    ]
    source = "{{ messages | tojson(sort_keys=true) }}"
    ours = ChatTemplate(source, named_tokens={}).render(Conversation(normal_messages(tuple(messages))))
    assert ours == transformers_text(byte_folder, source, messages)


def test_marks_appear_only_when_asked_for() -> None:
    template = ChatTemplate(MARKED, named_tokens={})
    chat = Conversation(({"role": "assistant", "content": "hi"},))
    assert template.has_marks
    assert template.render(chat, marks=("(", ")")).replace("(", "").replace(")", "") == template.render(chat)
    assert "\n(hi)<" in template.render(chat, marks=("(", ")"))
    assert not ChatTemplate("generation {{ generation }}", named_tokens={}).has_marks
    assert ChatTemplate("{%- generation -%}a{%+ endgeneration %}", named_tokens={}).has_marks


def test_the_clock_is_what_the_conversation_says() -> None:
    template = ChatTemplate(DATED, named_tokens={"bos_token": "<s>"})
    chat = Conversation((USER,), now=datetime(2026, 1, 2, 3, 4, 5))
    assert "Today: 02 January 2026, 03:04:05.000000" in template.render(chat)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ strftime_now.__self__ }}",
        "{{ ('%c' | format(1)).__class__ }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ 'a' * 1000000000 }}",
        "{{ 1000000000 * [1] }}",
        "{{ 10 ** 100000 }}",
        "{% include '/etc/hostname' %}",
        "{{ messages[0].content.format(messages) | attr('__class__') }}",
    ],
)
def test_p35_a_template_cannot_leave_the_sandbox(attack: str) -> None:
    template = ChatTemplate(attack, named_tokens={})
    try:
        text = template.render(Conversation((USER,)))
    except RENDER_ERRORS:
        return
    assert text == "", "what may not be seen is at most nothing"


def test_p35_a_template_sees_plain_values_only() -> None:
    class Rich:
        def wipe(self) -> str:
            raise AssertionError("called")

    template = ChatTemplate("{{ messages[0].content.wipe() }}", named_tokens={})
    with pytest.raises(TypeError, match="Rich"):
        template.render(Conversation(({"role": "user", "content": Rich()},)))


def test_a_template_refuses_in_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('no system role') }}", named_tokens={})
    with pytest.raises(jinja2.TemplateError, match="no system role"):
        template.render(Conversation((USER,)))


def test_a_template_with_a_mistake() -> None:
    with pytest.raises(DataError, match="line 2") as raised:
        ChatTemplate("fine\n{% if %}", named_tokens={})
    assert raised.value.code == "data-template-syntax"


def test_template_files(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("你{{ 1 }}", encoding="utf-8")
    assert read_template(str(path)) == "你{{ 1 }}"
    assert read_template(None) is None
    path.write_bytes(b"\xff\xfe\xff")
    for missing in (path, tmp_path / "none.jinja"):
        with pytest.raises(DataError) as raised:
            read_template(str(missing))
        assert raised.value.code == "data-template-file"
