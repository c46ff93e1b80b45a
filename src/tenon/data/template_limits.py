"""Bounds on one rendering of a chat template: steps of its loops and calls, and the length of what it puts together.

A sandbox keeps a template from reaching anything; it does not keep two nested loops from running for a day, nor a text
that is doubled forty times from filling the memory. So loops, captured blocks and sums of a parsed template are wrapped
in filters that count. This module does not know what templates are for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.visitor import NodeTransformer

# Ten thousand messages of a conversation, looked at a hundred times each.
MOST_STEPS = 1_000_000
CALL_STEPS = 4
LONGEST_TEXT = 10_000_000
BUDGET_VARIABLE = "tenon_budget"
_STEPS, _LENGTH = "tenon_steps", "tenon_length"


class Budget:
    """The steps that one rendering has left. Its names begin with an underscore: templates cannot reach such."""

    def __init__(self, steps: int = MOST_STEPS) -> None:
        self._left = steps

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise SecurityError(f"a chat template may take {MOST_STEPS:,} steps, and this one wants more")

    @staticmethod
    def spend(context: Context, steps: int) -> None:
        """Take steps from the budget of a rendering. Raises SecurityError when there are none left."""
        # Not `context.get`: what a template sets itself would be found first.
        budget = context.parent.get(BUDGET_VARIABLE)
        if not isinstance(budget, Budget):
            raise SecurityError(f"a chat template may not set {BUDGET_VARIABLE}")
        budget._spend(steps)


def bounded(environment: jinja2.Environment, source: str) -> nodes.Template:
    """A template, parsed, that counts what it does. Raises jinja2.TemplateSyntaxError."""
    environment.filters[_STEPS], environment.filters[_LENGTH] = _steps, require_length
    tree = _Counting().visit(environment.parse(source))
    assert isinstance(tree, nodes.Template)
    return tree


class _Counting(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  as Jinja finds it
        """A loop: each turn is a step."""
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _STEPS)
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:  # noqa: N802  as Jinja finds it
        """`{% set x %}…{% endset %}`: what it captures is measured."""
        self.generic_visit(node)
        node.filter = _filtered(node.filter, _LENGTH)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802  as Jinja finds it
        """`a ~ b` is measured."""
        self.generic_visit(node)
        return _filtered(node, _LENGTH)

    def visit_Add(self, node: nodes.Add) -> nodes.Node:  # noqa: N802  as Jinja finds it
        """`a + b` is measured."""
        self.generic_visit(node)
        return _filtered(node, _LENGTH)


def _filtered(node: nodes.Node | None, name: str) -> nodes.Filter:
    assert node is None or isinstance(node, nodes.Expr)
    found = nodes.Filter(node, name, [], [], None, None)
    if node is not None:
        found.set_lineno(node.lineno)
    return found


@jinja2.pass_context
def _steps(context: Context, items: Iterable[Any]) -> Iterable[Any]:
    """What a loop goes through, counted."""
    if isinstance(items, Sized):
        Budget.spend(context, len(items))
        return items
    return _each(context, items)


def _each(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        Budget.spend(context, 1)
        yield item


def require_length(value: Any) -> Any:
    """The value itself. Raises SecurityError for a text or list that no conversation needs."""
    if isinstance(value, str | list | tuple) and len(value) > LONGEST_TEXT:
        raise SecurityError(f"a chat template may put together {LONGEST_TEXT:,} characters, and not more")
    return value
