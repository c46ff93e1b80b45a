"""Who is asked or judged: the bare base, or an adapter that is put into a slot of the resident base.

This module does not know what the subjects are asked.
"""

from __future__ import annotations

from pathlib import Path

from tenon.adapters.peft_files import load_adapter, read_adapter
from tenon.batch import NO_SLOT
from tenon.data.render import Renderer
from tenon.data.tokens import TRAINING_DATE
from tenon.errors import AdapterError
from tenon.pipeline.engine import Workbench
from tenon.plan.requests import Subject


class Subjects:
    """Subjects by label; each adapter is loaded once, beside the others."""

    def __init__(self, bench: Workbench, renderer: Renderer) -> None:
        self._bench, self._renderer = bench, renderer
        self._loaded: dict[tuple[str, str], int] = {}

    def slot(self, subject: Subject) -> int:
        """The subject's slot in the bank. Raises AdapterError: those of `read_adapter`, and adapter-template."""
        if subject.folder is None:
            return NO_SLOT
        key = (subject.label, subject.folder)
        if key not in self._loaded:
            self._require_template(subject)
            self._loaded[key] = load_adapter(self._bench.bank, subject.label, read_adapter(Path(subject.folder)))
        return self._loaded[key]

    def renderer(self, subject: Subject) -> Renderer:
        """How conversations with the subject are rendered.

        An adapter is asked as it was trained: with its own system message where the conversation brings none, and, in
        templates that write the date, with the date of training. The bare base gets neither.
        """
        if subject.folder is None:
            return self._renderer
        return self._renderer.adapted(system=subject.system, now=TRAINING_DATE)

    def _require_template(self, subject: Subject) -> None:
        if subject.template_hash and subject.template_hash != self._renderer.template_hash:
            raise AdapterError(
                "adapter-template",
                f"{subject.label} was trained with another chat template than the one in use",
                got=f"{self._renderer.template_hash[:12]} instead of {subject.template_hash[:12]}",
                hint="use the template that it was trained with (data.template of its recipe)",
            )
