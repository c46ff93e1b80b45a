"""Who is asked or judged: the bare base, or an adapter that is put into a slot of the resident base.

This module does not know what the subjects are asked.
"""

from __future__ import annotations

from pathlib import Path

from tenon.adapters.asking import Renderers, asked_as_trained, stop_ids_of
from tenon.adapters.peft_files import load_adapter, read_adapter
from tenon.batch import NO_SLOT
from tenon.data.render import Renderer
from tenon.data.template import read_template
from tenon.pipeline.engine import Workbench
from tenon.plan.requests import Subject


class Subjects:
    """Subjects by label; each adapter is loaded once, beside the others."""

    def __init__(self, bench: Workbench, renderer: Renderer) -> None:
        self._bench, self._renderers = bench, Renderers(renderer)
        self._loaded: dict[tuple[str, str], int] = {}

    def slot(self, subject: Subject) -> int:
        """The subject's slot in the bank. Raises AdapterError: those of `read_adapter`, and adapter-template."""
        if subject.folder is None:
            return NO_SLOT
        key = (subject.label, subject.folder)
        if key not in self._loaded:
            self.renderer(subject)
            self._loaded[key] = load_adapter(self._bench.bank, subject.label, read_adapter(Path(subject.folder)))
        return self._loaded[key]

    def renderer(self, subject: Subject) -> Renderer:
        """How conversations with the subject are rendered: `asked_as_trained`, or for the bare base the base's way.

        Raises AdapterError adapter-template.
        """
        if subject.folder is None:
            return self._renderers.common
        template = read_template(subject.template)
        renderer = self._renderers.of(subject.label, template_hash=subject.template_hash, template=template)
        return asked_as_trained(renderer, subject.system)

    def stop_ids(self, subject: Subject) -> frozenset[int]:
        """Tokens that end the subject's answers. Raises AdapterError adapter-stop-token."""
        return stop_ids_of(subject.label, subject.stop_tokens, self.renderer(subject))
