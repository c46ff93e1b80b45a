"""A hostile chat template ends soon, with an error: it can neither run for a day nor fill the memory."""

from __future__ import annotations

import time

import pytest

from tenon.data.template import RENDER_ERRORS, ChatTemplate, Conversation
from tenon.data.template_limits import BUDGET_VARIABLE

CHAT = Conversation(({"role": "user", "content": "hello"},))
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop over a generator": (
        "{% for a in range(99999) %}{% for b in range(99999)|map('string') %}{% endfor %}{% endfor %}"
    ),
    "calls that fan out": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a loop that calls itself": (
        "{% for x in [range(9999)] * 9999 recursive %}{% if x is iterable %}{{ loop(x) }}{% endif %}{% endfor %}"
    ),
    "a text doubled": "{% set n = namespace(t='x' * 9) %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "a text added": "{% set n = namespace(t='x' * 999) %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "a list added": "{% set n = namespace(t=[0] * 999) %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "captured": "{% set t %}{{ 'x' * 999 }}{% endset %}" + "{% set t %}{{ t }}{{ t }}{% endset %}" * 40,
    "captured and filtered": "{% set t %}x{% endset %}" + "{% set t | trim %}{{ t }}{{ t }}{% endset %}" * 40,
    "macros": "{% macro m(t) %}{{ t }}{{ t }}{% endmacro %}{{ " + "m(" * 40 + "'x' * 999" + ")" * 40 + " }}",
    "its budget": "{% set "
    + BUDGET_VARIABLE
    + " = 9 %}{% block x scoped %}{% for i in [1] %}{% endfor %}{% endblock %}",
    "its budget called": "{{ " + BUDGET_VARIABLE + "._spend(-1000000000) }}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_p35_a_hostile_template_is_ended(kind: str) -> None:
    template = ChatTemplate(HOSTILE[kind], named_tokens={})
    began = time.process_time()
    with pytest.raises(RENDER_ERRORS):
        template.render(CHAT)
    assert time.process_time() - began < 5.0


def test_an_ordinary_template_may_do_what_it_does() -> None:
    """Ten thousand messages, each of them looked at with its neighbours."""
    source = (
        "{% for m in messages %}{{ loop.index ~ '/' ~ loop.length }}{% if loop.last %}!{% endif %}"
        "{% set t = m.content + '' %}{% for c in t.split(' ') if c %}{{ c }}{% endfor %}{% endfor %}"
    )
    chat = Conversation(({"role": "user", "content": "a b c"},) * 10_000)
    said = ChatTemplate(source, named_tokens={}).render(chat)
    assert said.startswith("1/10000abc2/10000abc") and said.endswith("10000/10000!abc")
    assert ChatTemplate("{{ 1 + 2 }}{{ [1] + [2] }}", named_tokens={}).render(CHAT) == "3[1, 2]"
