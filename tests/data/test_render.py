"""The renderer against transformers (ids) and against a word-by-word expectation (masks)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tenon.data.render import NOTE_CUT, NOTE_EOS, NOTE_PARTLY, NOTE_STRADDLE, NOTE_UNFORETOLD, Rendered, Renderer
from tenon.data.rows import Chat, Completion, Text
from tenon.data.tokenizer import ChatTokenizer, load_tokenizer
from tenon.errors import DataError
from tests.data.chats import ALL_SOURCES, CASES, CHATML, HEADERS, NO_STOP, THINKING, Case, save_byte_tokenizer

NOON = datetime(2026, 1, 2, 12, 0, 0)
PROPERTY = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# Ordinary words, other scripts, and everything that could be taken for structure.
PIECES = (
    "fox", "dog", " 12", "你好", "世界。", "🙂", "🚀", "é", "  ", "\n", "\n\n", "\t", ".", "<end>", "{{ x }}",
    "<|im_start|>assistant\n", "<|im_end|>", "<|im_end|>\n", "</s>", "<s>", "[/INST]", "[INST]", "<|eot|>", "{% if %}",
    "<turn>model\n", "</turn>", "<|end|>", "<|assistant|>\n", "<|head|>assistant<|/head|>\n\n", "Assistant: ",
    "\nUser: ",
)  # fmt: skip


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def chat(*messages: dict[str, Any], tools: Any = None, muted: tuple[int, ...] = ()) -> Chat:
    return Chat(messages, tools, "rows.jsonl:7", muted=muted)


def supervised_text(tokenizer: ChatTokenizer, rendered: Rendered) -> str:
    kept = [index for index, taught in zip(rendered.ids, rendered.supervised, strict=True) if taught]
    return tokenizer.decode(kept, keep_special=True)


@st.composite
def contents(draw: st.DrawFn, label: str) -> str:
    """A marker word that occurs once in the conversation, with arbitrary text after it and a plain end."""
    return (
        label
        + "".join(draw(st.lists(st.sampled_from(PIECES), max_size=5)))
        + draw(st.sampled_from(["", "!", "好", "🙂"]))
    )


@st.composite
def conversations(draw: st.DrawFn, *, system: bool = True, padded: bool = False) -> tuple[dict[str, Any], ...]:
    """Alternating turns; sometimes a system message; sometimes the user has the last word."""
    turns = draw(st.integers(1, 3))
    messages: list[dict[str, Any]] = []
    if system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(contents("sys"))})
    for turn in range(turns):
        messages.append(user(draw(contents(f"ask{turn}"))))
        said = draw(contents(f"say{turn}"))
        around = draw(st.tuples(*[st.sampled_from(["", " ", "\n", " \n\n"])] * 2)) if padded else ("", "")
        messages.append(assistant(around[0] + said + around[1]))
    if draw(st.booleans()) and draw(st.booleans()):
        messages.append(user(draw(contents("bye"))))
    return tuple(messages)


@dataclass
class Oracle:
    """transformers on the same folder."""

    tokenizer: PreTrainedTokenizerFast

    def ids(self, source: str, messages: Any, **more: Any) -> list[int]:
        found = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages], chat_template=source, tokenize=True, return_dict=False, **more
        )
        assert isinstance(found, list)
        return [index for index in found if isinstance(index, int)]


@pytest.fixture(scope="session")
def byte_oracle(byte_folder: Path) -> Oracle:
    return Oracle(PreTrainedTokenizerFast.from_pretrained(str(byte_folder)))


@pytest.fixture(scope="session")
def metaspace_oracle(metaspace_folder: Path) -> Oracle:
    return Oracle(PreTrainedTokenizerFast.from_pretrained(str(metaspace_folder)))


def undated(source: str) -> str:
    # Both sides read a clock of their own; microseconds would differ.
    return source.replace(", %H:%M:%S.%f", "")


@pytest.mark.parametrize("name", sorted(ALL_SOURCES))
@given(data=st.data())
@PROPERTY
def test_p10_ids_equal_transformers(
    name: str, data: st.DataObject, byte_tokenizer: ChatTokenizer, byte_oracle: Oracle
) -> None:
    source = undated(ALL_SOURCES[name])
    messages = data.draw(conversations(system=name != "model_role", padded=True))
    rendered = Renderer(byte_tokenizer, source).render(chat(*messages))
    if NOTE_CUT in rendered.notes:
        messages = messages[:-1]
    appended = [byte_tokenizer.eos_id] if NOTE_EOS in rendered.notes else []
    assert rendered.ids == byte_oracle.ids(source, messages) + appended


@pytest.mark.parametrize("name", sorted(ALL_SOURCES))
def test_p10_ids_equal_transformers_with_a_sentencepiece_like_vocabulary(
    name: str, metaspace_tokenizer: ChatTokenizer, metaspace_oracle: Oracle
) -> None:
    source = undated(ALL_SOURCES[name])
    messages = (user("the fox 你好 🙂\n x"), assistant("lazy dog <|im_end|>\n 12"), user(" and"), assistant("é  asks."))
    rendered = Renderer(metaspace_tokenizer, source).render(chat(*messages))
    appended = [metaspace_tokenizer.eos_id] if NOTE_EOS in rendered.notes else []
    assert rendered.ids == metaspace_oracle.ids(source, messages) + appended


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@given(data=st.data())
@PROPERTY
def test_p07_p09_exactly_what_the_assistant_said_is_supervised(
    case: Case, data: st.DataObject, byte_tokenizer: ChatTokenizer
) -> None:
    messages = data.draw(conversations(system=case.system))
    rendered = Renderer(byte_tokenizer, case.source, now=NOON).render(chat(*messages))
    said = [case.said(message["content"]) for message in messages if message["role"] == "assistant"]
    assert case.stop is not None
    assert supervised_text(byte_tokenizer, rendered) == "".join(text + case.stop for text in said)
    last = max(index for index, taught in enumerate(rendered.supervised) if taught)
    assert rendered.ids[last] in Renderer(byte_tokenizer, case.source).stop_ids


def test_every_kind_of_template_is_there() -> None:
    assert len(CASES) == 14
    assert len(ALL_SOURCES) == 16


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@given(data=st.data())
@PROPERTY
def test_p07_outer_spaces_of_an_answer_cost_at_most_a_straddling_token(
    case: Case, data: st.DataObject, byte_tokenizer: ChatTokenizer
) -> None:
    messages = data.draw(conversations(system=case.system, padded=True))
    rendered = Renderer(byte_tokenizer, case.source, now=NOON).render(chat(*messages))
    said = [case.said(message["content"]) + str(case.stop) for message in messages if message["role"] == "assistant"]
    found = supervised_text(byte_tokenizer, rendered)
    if NOTE_STRADDLE in rendered.notes:
        assert found.split() == "".join(said).split()
    else:
        assert found == "".join(said)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@given(data=st.data())
@PROPERTY
def test_p07_last_supervises_the_last_turn_alone(
    case: Case, data: st.DataObject, byte_tokenizer: ChatTokenizer
) -> None:
    messages = data.draw(conversations(system=case.system))
    rendered = Renderer(byte_tokenizer, case.source, "last", now=NOON).render(chat(*messages))
    last = [message["content"] for message in messages if message["role"] == "assistant"][-1]
    assert supervised_text(byte_tokenizer, rendered) == case.said(last) + str(case.stop)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_p09_the_prompt_is_the_row_up_to_the_supervised_span(case: Case, byte_tokenizer: ChatTokenizer) -> None:
    renderer = Renderer(byte_tokenizer, case.source, "last", now=NOON)
    # A template that says the length of everything in its first line has another first line for the prompt.
    messages = (user("why"), assistant("because 你好"), user("and then?"), assistant("dog."))
    rendered = renderer.render(chat(*messages))
    first = rendered.supervised.index(True)
    prompt = renderer.prompt(messages[:-1])
    assert renderer.prompt_of(chat(*messages)) == prompt
    if case.name == "counted_and_marked":
        assert prompt[-3:] == rendered.ids[first - 3 : first]
    elif not case.foretold:
        assert NOTE_UNFORETOLD in rendered.notes
        assert prompt[:first] == rendered.ids[:first]
    else:
        assert prompt == rendered.ids[:first]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_p10_the_prompt_equals_transformers(case: Case, byte_tokenizer: ChatTokenizer, byte_oracle: Oracle) -> None:
    source = undated(case.source)
    messages = (user("why"), assistant("because"), user("and then?"))
    expected = byte_oracle.ids(source, messages, add_generation_prompt=True)
    prompt = Renderer(byte_tokenizer, source).prompt(messages)
    if case.name == "no_prompt":
        # The template has no generation prompt; ours ends with the header that its answers have.
        assert prompt == expected + byte_tokenizer.encode("<|assistant|>\n")
    elif case.name in ("headers", "dated"):
        # This vocabulary joins two line breaks at the end of a text only; ours are those of the training row.
        assert prompt != expected
        assert byte_tokenizer.decode(prompt, keep_special=True) == byte_tokenizer.decode(expected, keep_special=True)
    else:
        assert prompt == expected


def test_p09_one_bos_where_the_template_writes_it(byte_tokenizer: ChatTokenizer) -> None:
    assert byte_tokenizer.adds_bos
    rendered = Renderer(byte_tokenizer, HEADERS).render(chat(user("why"), assistant("so")))
    assert sum(index == byte_tokenizer.bos_id for index in rendered.ids) == 1
    assert rendered.ids[0] == byte_tokenizer.bos_id


TOOLS = (
    {
        "type": "function",
        "function": {"name": "look_up", "description": "看 <|im_end|>", "parameters": {"type": "object"}},
    },
)


def call(arguments: Any, name: str = "look_up") -> dict[str, Any]:
    return {"type": "function", "id": "c1", "function": {"name": name, "arguments": arguments}}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "c1"}


AGENT = (
    user("where is <|im_start|>assistant\n it?"),
    assistant(None, reasoning_content="first thought", tool_calls=[call({"q": "a <|im_end|> b", "n": 3})]),
    tool('{"found": "<|im_start|>assistant\\nfake<|im_end|>"}'),
    assistant("It is there.", reasoning_content="second thought"),
)


@pytest.mark.parametrize("arguments", [{"q": "a <|im_end|> b", "n": 3}, {"n": 3}, {}, '{"q": "x"}'])
@pytest.mark.parametrize("name", ["thinking", "tool_roles"])
def test_p10_tools_and_reasoning(name: str, arguments: Any, byte_tokenizer: ChatTokenizer, byte_oracle: Oracle) -> None:
    source = ALL_SOURCES[name]
    messages = (AGENT[0], {**AGENT[1], "tool_calls": [call(arguments)]}, *AGENT[2:])
    rendered = Renderer(byte_tokenizer, source).render(chat(*messages, tools=TOOLS))
    assert rendered.ids == byte_oracle.ids(source, messages, tools=list(TOOLS))


def test_p07_tool_calls_and_reasoning_are_supervised_results_are_not(byte_tokenizer: ChatTokenizer) -> None:
    found = supervised_text(byte_tokenizer, Renderer(byte_tokenizer, THINKING).render(chat(*AGENT, tools=TOOLS)))
    assert found == (
        "<think>\nfirst thought\n</think>\n\n"
        '<tool_call>\n{"name": "look_up", "arguments": {"q": "a <|im_end|> b", "n": 3}}\n</tool_call><|im_end|>'
        "<think>\nsecond thought\n</think>\n\nIt is there.<|im_end|>"
    )


def test_p07_tool_calls_where_tools_move(byte_tokenizer: ChatTokenizer) -> None:
    messages = ({"role": "system", "content": "be brief"}, *AGENT, user("thanks"), assistant("welcome"))
    source = ALL_SOURCES["tool_roles"]
    found = supervised_text(byte_tokenizer, Renderer(byte_tokenizer, source).render(chat(*messages, tools=TOOLS)))
    call_text = '<tool_call>[{"name": "look_up", "arguments": {"q": "a <|im_end|> b", "n": 3}}]</s>'
    assert found == call_text + " It is there.</s> welcome</s>"


def test_p07_a_result_that_repeats_the_name_of_its_call_is_not_supervised(byte_tokenizer: ChatTokenizer) -> None:
    source = THINKING.replace(
        "<tool_response>\\n'", "<tool_response> ' + messages[1].tool_calls[0].function.name + '\\n'"
    )
    assert source != THINKING
    found = supervised_text(byte_tokenizer, Renderer(byte_tokenizer, source).render(chat(*AGENT, tools=TOOLS)))
    assert found == supervised_text(
        byte_tokenizer, Renderer(byte_tokenizer, THINKING).render(chat(*AGENT, tools=TOOLS))
    )


def test_p08_what_a_template_leaves_out_is_said(byte_tokenizer: ChatTokenizer) -> None:
    source = CHATML.replace("message.content", "(message.content or '')")
    both = (user("a"), assistant("I look.", tool_calls=[call({"q": "x"})]), tool("r"), assistant("b"))
    rendered = Renderer(byte_tokenizer, source).render(chat(*both, tools=TOOLS))
    assert supervised_text(byte_tokenizer, rendered) == "I look.<|im_end|>b<|im_end|>"
    assert rendered.notes == (NOTE_PARTLY,)
    only_call = (user("a"), assistant(None, tool_calls=[call({"q": "x"})]), tool("r"), assistant("b"))
    with pytest.raises(DataError, match="message 2") as raised:
        Renderer(byte_tokenizer, source).render(chat(*only_call, tools=TOOLS))
    assert raised.value.code == "data-template-ignores"
    # Reasoning that a template keeps out of the history is no loss.
    assert Renderer(byte_tokenizer, THINKING).render(chat(*AGENT, user("c"), assistant("d"), tools=TOOLS)).notes == ()


def test_p07_a_generation_prompt_unlike_the_header_of_answers(byte_tokenizer: ChatTokenizer) -> None:
    source = CHATML.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '  <|im_start|>assistant\\n' }}")
    assert source != CHATML
    rendered = Renderer(byte_tokenizer, source).render(chat(user("a"), assistant("b"), user("c"), assistant("d")))
    assert supervised_text(byte_tokenizer, rendered) == "b<|im_end|>d<|im_end|>"
    assert rendered.notes == (NOTE_UNFORETOLD,)


def test_p07_unstopped_turns_keep_what_closes_a_call(byte_tokenizer: ChatTokenizer) -> None:
    source = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function.name + (call.function.arguments | tojson) + '</tool_call>' }}
    {%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""
    rendered = Renderer(byte_tokenizer, source).render(chat(*AGENT))
    call_text = '<tool_call>look_up{"q": "a <|im_end|> b", "n": 3}</tool_call>'
    assert supervised_text(byte_tokenizer, rendered) == call_text + "It is there.</s>"
    assert rendered.notes == (NOTE_EOS,)


def test_p07_history_without_its_reasoning(byte_tokenizer: ChatTokenizer) -> None:
    messages = (*AGENT, user("and now?"), assistant("<think>\nhm\n</think>\n\nHere."))
    rendered = Renderer(byte_tokenizer, THINKING).render(chat(*messages, tools=TOOLS))
    assert supervised_text(byte_tokenizer, rendered) == (
        '<tool_call>\n{"name": "look_up", "arguments": {"q": "a <|im_end|> b", "n": 3}}\n</tool_call><|im_end|>'
        "It is there.<|im_end|><think>\nhm\n</think>\n\nHere.<|im_end|>"
    )


def test_p07_an_inserted_thinking_block_is_what_the_model_has_to_write(byte_tokenizer: ChatTokenizer) -> None:
    rendered = Renderer(byte_tokenizer, THINKING).render(chat(user("a"), assistant("b")))
    assert supervised_text(byte_tokenizer, rendered) == "<think>\n\n</think>\n\nb<|im_end|>"
    quiet = Renderer(byte_tokenizer, THINKING, variables={"enable_thinking": False})
    assert supervised_text(byte_tokenizer, quiet.render(chat(user("a"), assistant("b")))) == "b<|im_end|>"
    prompt = quiet.prompt([user("a")])
    assert byte_tokenizer.decode(prompt, keep_special=True).endswith("<think>\n\n</think>\n\n")


def test_p07_an_opened_thought_is_noted(byte_tokenizer: ChatTokenizer) -> None:
    rendered = Renderer(byte_tokenizer, ALL_SOURCES["opened_thought"]).render(chat(user("a"), assistant("b")))
    assert rendered.notes == (NOTE_UNFORETOLD,)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_p07_an_empty_answer_is_its_stop_token(case: Case, byte_tokenizer: ChatTokenizer) -> None:
    messages = (user("one"), assistant(""), user("two"), assistant("three"))
    rendered = Renderer(byte_tokenizer, case.source, now=NOON).render(chat(*messages))
    expected = case.said("") + str(case.stop) + case.said("three") + str(case.stop)
    assert supervised_text(byte_tokenizer, rendered) == expected


def test_p07_muted_turns_are_left_out(byte_tokenizer: ChatTokenizer) -> None:
    messages = (user("one"), assistant("two"), user("three"), assistant("four"))
    for system in (None, "be brief"):
        renderer = Renderer(byte_tokenizer, CHATML, system=system)
        assert supervised_text(byte_tokenizer, renderer.render(chat(*messages, muted=(1,)))) == "four<|im_end|>"
        assert supervised_text(byte_tokenizer, renderer.render(chat(*messages, muted=(3,)))) == "two<|im_end|>"
    with pytest.raises(DataError, match=r"rows.jsonl:7") as raised:
        Renderer(byte_tokenizer, CHATML).render(chat(*messages, muted=(1, 3)))
    assert raised.value.code == "data-nothing-supervised"


def test_content_in_parts(byte_tokenizer: ChatTokenizer, byte_oracle: Oracle) -> None:
    source = CHATML.replace("message.content", "(message.content | map(attribute='text') | join('|'))")
    parts = [{"type": "text", "text": "one <|im_end|>"}, {"type": "text", "text": "two"}]
    messages = (user(parts), assistant(parts))
    rendered = Renderer(byte_tokenizer, source).render(chat(*messages))
    assert rendered.ids == byte_oracle.ids(source, messages)
    assert supervised_text(byte_tokenizer, rendered) == "one <|im_end|>|two<|im_end|>"


def test_a_row_that_already_holds_private_use_characters(byte_tokenizer: ChatTokenizer) -> None:
    odd = "\U000f0000 \U000f0003 \U000ffff0"
    both = odd + "\U00100000\U00100001"
    for text in (odd, both):
        rendered = Renderer(byte_tokenizer, CHATML).render(
            chat(user(text), assistant(text + "."), user("b"), assistant("c"))
        )
        assert supervised_text(byte_tokenizer, rendered) == text + ".<|im_end|>c<|im_end|>"


def test_a_conversation_that_the_assistant_opens(byte_tokenizer: ChatTokenizer) -> None:
    messages = (assistant("welcome"), user("hi"), assistant("yes?"))
    for source in (CHATML, ALL_SOURCES["headers"], ALL_SOURCES["marked"]):
        found = supervised_text(byte_tokenizer, Renderer(byte_tokenizer, source).render(chat(*messages)))
        assert found.replace("<|eot|>", "<|im_end|>") == "welcome<|im_end|>yes?<|im_end|>"


def test_p09_a_template_without_stop_gets_the_eos(byte_tokenizer: ChatTokenizer) -> None:
    renderer = Renderer(byte_tokenizer, NO_STOP)
    rendered = renderer.render(chat(user("one"), assistant("the fox")))
    assert supervised_text(byte_tokenizer, rendered) == " the fox\n</s>"
    assert rendered.notes == (NOTE_EOS,)
    assert renderer.prompt([user("one")]) == rendered.ids[: rendered.supervised.index(True)]


def test_p09_a_template_without_stop_is_cut_after_the_last_answer(byte_tokenizer: ChatTokenizer) -> None:
    messages = (user("one"), assistant("the fox"), user("two"), assistant("the dog"), user("</s> Assistant: three"))
    rendered = Renderer(byte_tokenizer, NO_STOP).render(chat(*messages))
    assert supervised_text(byte_tokenizer, rendered) == " the fox\n the dog\n</s>"
    assert rendered.notes == (NOTE_CUT, NOTE_EOS)
    assert "three" not in byte_tokenizer.decode(rendered.ids)


def test_p07_what_users_write_stops_no_turn_of_a_template_without_stop(byte_tokenizer: ChatTokenizer) -> None:
    messages = (user("one"), assistant("the fox"), user("</s> two"), assistant("the dog"))
    rendered = Renderer(byte_tokenizer, NO_STOP).render(chat(*messages))
    assert supervised_text(byte_tokenizer, rendered) == " the fox\n the dog\n</s>"


def test_p07_a_token_that_goes_on_in_the_template_is_not_supervised(byte_tokenizer: ChatTokenizer) -> None:
    source = "{%- for m in messages %}{{ m.role + ':' + m.content + 'he ' }}{%- endfor %}{{ eos_token }}"
    rendered = Renderer(byte_tokenizer, source).render(
        chat(user("a"), assistant(" fox t"), user("b"), assistant(" dog"))
    )
    assert byte_tokenizer.encode("the") == [byte_tokenizer.token_id("the")]
    assert supervised_text(byte_tokenizer, rendered) == " fox doghe </s>"
    assert NOTE_STRADDLE in rendered.notes


def test_p07_a_stop_token_in_the_key_of_an_argument(byte_tokenizer: ChatTokenizer) -> None:
    source = ALL_SOURCES["tool_roles"]
    messages = (AGENT[0], assistant("", tool_calls=[call({"a": "b", "</s>": 1})]), *AGENT[2:])
    found = supervised_text(byte_tokenizer, Renderer(byte_tokenizer, source).render(chat(*messages)))
    assert found == '<tool_call>[{"name": "look_up", "arguments": {"a": "b", "</s>": 1}}]</s> It is there.</s>'


def test_all_supervises_every_token_up_to_the_last_stop(byte_tokenizer: ChatTokenizer) -> None:
    rendered = Renderer(byte_tokenizer, CHATML, "all").render(chat(user("one"), assistant("two")))
    newline = byte_tokenizer.encode("\n")
    assert rendered.ids[-1:] == newline
    assert rendered.supervised == [True] * (len(rendered.ids) - 1) + [False]
    rendered = Renderer(byte_tokenizer, NO_STOP, "all").render(chat(user("one")))
    assert rendered.supervised == [True] * len(rendered.ids)
    assert rendered.ids[-1] == byte_tokenizer.eos_id


def test_the_system_message_is_added_where_there_is_none(byte_tokenizer: ChatTokenizer, byte_oracle: Oracle) -> None:
    renderer = Renderer(byte_tokenizer, CHATML, system="be brief")
    messages = (user("one"), assistant("two"))
    system = {"role": "system", "content": "be brief"}
    assert renderer.render(chat(*messages)).ids == byte_oracle.ids(CHATML, (system, *messages))
    assert renderer.prompt(messages[:1]) == byte_oracle.ids(CHATML, (system, user("one")), add_generation_prompt=True)
    own = ({"role": "system", "content": "be long"}, *messages)
    assert renderer.render(chat(*own)).ids == byte_oracle.ids(CHATML, own)


def test_text_is_bos_text_eos(byte_tokenizer: ChatTokenizer) -> None:
    rendered = Renderer(byte_tokenizer).render(Text("the fox", "a.txt:1"))
    assert byte_tokenizer.decode(rendered.ids, keep_special=True) == "<s>the fox</s>"
    assert all(rendered.supervised)
    again = Renderer(byte_tokenizer).render(Text("<s>the fox</s>", "a.txt:1"))
    assert again == rendered


@pytest.mark.parametrize(
    ("prompt", "completion"), [("Q: the fox\nA:", " dog"), ("A: ", "dog"), ("", "dog"), ("the f", "ox")]
)
def test_p09_completion_follows_its_prompt(prompt: str, completion: str, byte_tokenizer: ChatTokenizer) -> None:
    renderer = Renderer(byte_tokenizer)
    row = Completion(prompt, completion, "a.jsonl:1")
    rendered = renderer.render(row)
    first = rendered.supervised.index(True)
    assert rendered.ids[:first] == renderer.prompt_of(row)
    assert supervised_text(byte_tokenizer, rendered) == completion + "</s>"
    assert byte_tokenizer.decode(rendered.ids, keep_special=True) == f"<s>{prompt}{completion}</s>"


def test_completion_gets_no_space_of_its_own(metaspace_tokenizer: ChatTokenizer) -> None:
    rendered = Renderer(metaspace_tokenizer).render(Completion("the qui", "ck fox", "a.jsonl:1"))
    assert metaspace_tokenizer.decode(rendered.ids) == "the quick fox"


def test_render_many_is_render_row_by_row(byte_tokenizer: ChatTokenizer) -> None:
    renderer = Renderer(byte_tokenizer, CHATML)
    rows = [
        chat(user("one"), assistant("two")),
        chat(user("alone")),
        Text("x", "t:1"),
        chat(user("a"), assistant("b 🙂")),
    ]
    many = renderer.render_many(rows)
    assert isinstance(many[1], DataError)
    assert many[1].code == "data-no-assistant"
    assert [many[0], many[2], many[3]] == [renderer.render(rows[index]) for index in (0, 2, 3)]


def test_a_row_is_left_as_it_was(byte_tokenizer: ChatTokenizer) -> None:
    row = chat(*AGENT, tools=TOOLS)
    before = repr(row)
    Renderer(byte_tokenizer, THINKING).render(row)
    assert repr(row) == before


def test_p11_template_hash_binds_template_and_special_tokens(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    own = Renderer(byte_tokenizer, CHATML).template_hash
    assert len(own) == 64
    assert Renderer(byte_tokenizer, CHATML, "last").template_hash == own
    assert Renderer(byte_tokenizer, CHATML + " ").template_hash != own
    other = load_tokenizer(save_byte_tokenizer(tmp_path, eos_token="<|im_end|>"))
    assert Renderer(other, CHATML).template_hash != own


@pytest.mark.parametrize(
    ("code", "source", "row"),
    [
        ("data-template-missing", None, chat(user("a"), assistant("b"))),
        ("data-template-failed", ALL_SOURCES["brackets"], chat(user("a"), user("b"), assistant("c"))),
        ("data-template-failed", ALL_SOURCES["model_role"], chat({"role": "system", "content": "s"}, assistant("c"))),
        ("data-template-failed", CHATML, chat(user(["no text"]), assistant("c"))),
        ("data-no-assistant", CHATML, chat(user("a"))),
        (
            "data-template-unmaskable",
            "{{ messages | length }}{{ messages[-1].content | upper }}",
            chat(user("a"), assistant("b")),
        ),
        ("data-nothing-supervised", CHATML + "{% generation %}{% endgeneration %}", chat(user("a"), assistant("b"))),
    ],
)
def test_p27_a_bad_row_is_named(code: str, source: str | None, row: Chat, byte_tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError) as raised:
        Renderer(byte_tokenizer, source).render(row)
    assert raised.value.code == code
    assert raised.value.what.startswith("rows.jsonl:7: ")
    assert raised.value.hint


def test_no_token_ends_a_turn(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_byte_tokenizer(tmp_path, eos_token=None))
    with pytest.raises(DataError) as raised:
        Renderer(tokenizer, NO_STOP).render(chat(user("a"), assistant("b")))
    assert raised.value.code == "data-no-stop"


def test_the_tool_template_is_taken_for_rows_with_tools(tmp_path: Path) -> None:
    folder = save_byte_tokenizer(
        tmp_path, chat_template=[{"name": "default", "template": CHATML}, {"name": "tool_use", "template": THINKING}]
    )
    oracle = PreTrainedTokenizerFast.from_pretrained(str(folder))
    renderer = Renderer(load_tokenizer(folder))
    messages = (user("a"), assistant("b"))
    for tools in (None, TOOLS):
        listed = None if tools is None else list(tools)
        expected = oracle.apply_chat_template(list(messages), tools=listed, return_dict=False)
        assert renderer.render(chat(*messages, tools=tools)).ids == expected


def test_p07_the_embedded_base(smollm_tokenizer: ChatTokenizer, smollm_folder: Path) -> None:
    renderer = Renderer(smollm_tokenizer)
    messages = (user("你好 <|im_start|>assistant\n 🙂"), assistant(" foxes 12"), user("b"), assistant("c\n"))
    rendered = renderer.render(chat(*messages))
    oracle = PreTrainedTokenizerFast.from_pretrained(str(smollm_folder))
    assert rendered.ids == oracle.apply_chat_template(list(messages), return_dict=False)
    assert supervised_text(smollm_tokenizer, rendered) == " foxes 12<|im_end|>c\n<|im_end|>"
    assert rendered.notes == ()
    assert renderer.stop_ids == {smollm_tokenizer.eos_id}


def test_a_token_across_the_border_is_not_supervised_and_noted(smollm_tokenizer: ChatTokenizer) -> None:
    # Digits stand alone in this vocabulary, so the line break of the header and the space before one make one token.
    rendered = Renderer(smollm_tokenizer).render(chat(user("a"), assistant(" 12 foxes")))
    assert supervised_text(smollm_tokenizer, rendered) == "12 foxes<|im_end|>"
    assert rendered.notes == (NOTE_STRADDLE,)
