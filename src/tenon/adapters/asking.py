"""An adapter is asked as it was trained: with its own template, system message and date.

This module does not know tensors, nor where adapters are kept.
"""

from __future__ import annotations

from tenon.data.render import Renderer
from tenon.data.tokens import TRAINING_DATE
from tenon.errors import AdapterError


def require_template(label: str, template_hash: str, renderer: Renderer) -> None:
    """Refuse another chat template than the adapter's. template_hash: "" when unknown, which any template fits.

    Raises AdapterError adapter-template.
    """
    if template_hash and template_hash != renderer.template_hash:
        raise AdapterError(
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
