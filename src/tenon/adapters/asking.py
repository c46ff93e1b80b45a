"""An adapter is asked as it was trained: with its own template, system message and date.

This module does not know tensors, nor where adapters are kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from tenon.data.render import Renderer
from tenon.data.tokens import TRAINING_DATE
from tenon.errors import AdapterError, DataError
from tenon.values import hash_text

# Compiled templates that are kept at hand; making one costs some milliseconds.
_MOST_KEPT = 64


class Renderers:
    """The renderers of one base: the one in use, and those of adapters that were trained with another template.

    Safe to use from any thread.
    """

    def __init__(self, common: Renderer) -> None:
        """common: for the bare base, and for every adapter that was trained with its template."""
        self.common = common
        self._others: OrderedDict[str, Renderer] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, label: str, *, template_hash: str, template: str | None) -> Renderer:
        """How an adapter's conversations are rendered. template_hash: of its training, "" when that is unknown.
        template: the source that is kept with it; None where it was trained with one of the base's.

        Raises AdapterError adapter-template where no template at hand is the one that it was trained with.
        """
        if template is None and template_hash in ("", self.common.template_hash):
            return self.common
        found = self._other(label, template)
        if template_hash and template_hash != found.template_hash:
            raise _other_template(label, template_hash, self.common if template is None else found)
        return found

    def _other(self, label: str, template: str | None) -> Renderer:
        key = "" if template is None else hash_text(template)
        with self._lock:
            if key not in self._others:
                self._others[key] = _with_template(label, self.common, template)
                if len(self._others) > _MOST_KEPT:
                    self._others.popitem(last=False)
            self._others.move_to_end(key)
            return self._others[key]


def _with_template(label: str, renderer: Renderer, template: str | None) -> Renderer:
    try:
        return renderer.with_template(template)
    except DataError as error:
        raise AdapterError(
            "adapter-template",
            f"{label}: its own chat template cannot be used: {error.what}",
            hint="register the adapter again with a template that can",
        ) from error


def require_template(label: str, template_hash: str, renderer: Renderer) -> None:
    """Refuse another chat template than the adapter's. template_hash: "" when unknown, which any template fits.

    Raises AdapterError adapter-template.
    """
    if template_hash and template_hash != renderer.template_hash:
        raise _other_template(label, template_hash, renderer)


def _other_template(label: str, template_hash: str, renderer: Renderer) -> AdapterError:
    return AdapterError(
        "adapter-template",
        f"{label} was trained with another chat template than the one in use",
        got=f"{renderer.template_hash[:12]} instead of {template_hash[:12]}",
        hint="use the template that it was trained with (data.template of its recipe)",
    )


def asked_as_trained(renderer: Renderer, system: str | None) -> Renderer:
    """The base's renderer as an adapter wants it.

    Its own system message stands where the conversation brings none, and templates that write the date get the date of
    training.
    """
    return renderer.adapted(system=system, now=TRAINING_DATE)


def stop_ids_of(label: str, tokens: Sequence[str], renderer: Renderer) -> frozenset[int]:
    """The ids that end an answer: those of the renderer, and an adapter's own tokens, given as text.

    Raises AdapterError adapter-stop-token for one that the base does not have.
    """
    own = {token: renderer.tokenizer.token_id(token) for token in tokens}
    unknown = [token for token, number in own.items() if number is None]
    if unknown:
        raise AdapterError(
            "adapter-stop-token",
            f"{label}: the base has no token {unknown[0]!r} to stop at",
            hint="write the token as the tokenizer does, for example <|im_end|>; any other text belongs in `stop`",
        )
    return renderer.stop_ids | {number for number in own.values() if number is not None}
