"""Chat templates of every kind that bases come with, written for these tests, and small tokenizers to encode them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

STRUCTURE = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|eot|>", "<|head|>", "<|/head|>", "<turn>", "</turn>",
    "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|endoftext|>",
)  # fmt: skip
MARKUP = ("<tool_call>", "</tool_call>", "<think>", "</think>")

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

HEADERS = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\\n\\n' }}{%- endif %}"""

BRACKETS = """\
{%- set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 is even) %}
        {{- raise_exception('roles must alternate, the user first') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (ns.system if loop.first else '') + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

MODEL_ROLE = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('there is no system role') }}{%- endif %}
{%- for message in messages %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<turn>' + role + '\\n' + message.content | trim + '</turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<turn>model\\n' }}{%- endif %}"""

THINKING = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'Tools:' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1, looking=true) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if ns.looking and message.role == 'user' %}
        {%- set ns.looking = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if loop.index0 or content %}{{- '\\n' }}{%- endif %}
            {%- set call = call.function or call %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

END_AND_EOS = """\
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

MARKED = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{- message.content }}{%- endgeneration %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# The marks take in the header and the line break after the stop token, and are opened in a macro.
MARKED_WIDELY = """\
{%- macro turn(role, text) %}{{- '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' }}{%- endmacro %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- turn('assistant', message.content) }}{%- endgeneration %}
    {%- else %}
        {{- turn(message.role, message.content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LINES = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

NO_STOP = """\
{%- for message in messages %}
    {{- message.role | capitalize + ': ' + message.content + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"""

DATED = """\
{{- bos_token + '<|head|>system<|/head|>\\n\\nToday: ' + strftime_now('%d %B %Y, %H:%M:%S.%f') + '<|eot|>' }}
{%- for message in messages %}
    {{- '<|head|>' + message.role + '<|/head|>\\n\\n' + message.content + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\\n\\n' }}{%- endif %}"""

# Tools stand before the last question, results are JSON, the system prompt moves to the last question.
TOOL_ROLES = """\
{%- set ns = namespace(system='', last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- set ns.system = message.content + '\\n\\n' %}{%- endif %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if loop.index0 == ns.last and tools %}{{- '<|tool|>' + tools | tojson + '<|end|>' }}{%- endif %}
        {{- '[INST] ' + (ns.system if loop.index0 == ns.last else '') + message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}
        {{- '<|tool|>' + {'content': message.content} | tojson + '<|end|>' }}
    {%- elif message.tool_calls %}
        {{- '<tool_call>[' }}
        {%- for call in message.tool_calls %}
            {{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
            {{- ', ' if not loop.last else '' }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

OPENED_THOUGHT = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>' + message.content.split('</think>')[-1] | trim + '<|end|>' }}
    {%- else %}
        {{- '<|' + message.role + '|>' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|><think>\\n' }}{%- endif %}"""

NO_PROMPT = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endfor %}"""

# Every message says its own length: markers would change what is written.
COUNTED = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '[' ~ message.content | length ~ ']\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"""

# The first line says how long all is, so neither markers nor prefixes can hold; the marks say all.
COUNTED_AND_MARKED = """\
{{- messages | map(attribute='content') | join | length ~ ' characters\\n' }}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@dataclass(frozen=True)
class Case:
    """A template, what it makes of an assistant's content, and the stop that it writes (None: it writes none).

    space: the span begins with the space before the answer.
    """

    name: str
    source: str
    stop: str | None
    said: Callable[[str], str] = str
    system: bool = True
    foretold: bool = True


def _stripped(content: str) -> str:
    return content.strip()


CASES = (
    Case("chatml", CHATML, "<|im_end|>"),
    Case("headers", HEADERS, "<|eot|>", _stripped),
    Case("brackets", BRACKETS, "</s>", lambda content: f" {content.strip()} "),
    Case("model_role", MODEL_ROLE, "</turn>", _stripped, system=False),
    Case("end_and_eos", END_AND_EOS, "<|end|>"),
    Case("marked", MARKED, "<|im_end|>"),
    Case("marked_widely", MARKED_WIDELY, "<|im_end|>"),
    Case("lines", LINES, "</s>"),
    Case("dated", DATED, "<|eot|>"),
    Case("tool_roles", TOOL_ROLES, "</s>", lambda content: f" {content.strip()}"),
    Case("opened_thought", OPENED_THOUGHT, "<|end|>", _stripped, foretold=False),
    Case("no_prompt", NO_PROMPT, "<|end|>"),
    Case("counted", COUNTED, "<|im_end|>", lambda content: f"[{len(content)}]\n{content}"),
    Case("counted_and_marked", COUNTED_AND_MARKED, "<|im_end|>"),
)
# Thinking blocks and missing stops need their own expectations (see test_render).
ALL_SOURCES = {case.name: case.source for case in CASES} | {"thinking": THINKING, "no_stop": NO_STOP}

CORPUS = (
    "the quick brown fox jumps over the lazy dog and asks why 12 + 34 = 46.",
    "user assistant system model tool: Today characters helpful, [] {} name arguments\n\n",
    "你好，世界。请问今天天气怎么样？ 我很好，谢谢。",
    "emoji 🙂🚀 and é, ü, ß  two  spaces\n\n\nlines\t<end> <|x|> </y>",
)


def save_byte_tokenizer(folder: Path, **config: Any) -> Path:
    """A byte-level BPE tokenizer as HF-style folder, with trimmed offsets and a BOS that its post-processor adds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=list(STRUCTURE), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return _save(tokenizer, folder, config)


def save_metaspace_tokenizer(folder: Path, **config: Any) -> Path:
    """A SentencePiece-like BPE tokenizer with byte fallback as HF-style folder."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    every_byte = [f"<0x{value:02X}>" for value in range(256)]
    words = ["\n".join(CORPUS[:2]).replace("\n", " ")]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *STRUCTURE, *every_byte])
    tokenizer.train_from_iterator(words * 3, trainer)
    # The trainer made the bytes added tokens; a SentencePiece vocabulary has them as plain pieces.
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in every_byte]
    return _save(Tokenizer.from_str(json.dumps(tree)), folder, config)


def _save(tokenizer: Tokenizer, folder: Path, config: dict[str, Any]) -> Path:
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in MARKUP])
    bos = tokenizer.token_to_id("<s>")
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tree = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>", **config}
    tree["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder
