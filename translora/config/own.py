"""What an adapter of a fleet may have of its own, in the place of the fleet's setting."""

from __future__ import annotations

from pydantic import Field

from translora.config.base import PromptTemplate
from translora.config.synthesis import Screen
from translora.config_file import Epochs, NumSamples, Strict


class OwnSettings(Strict):
    """Of one bundle, of a glob over bundles, or of bundles that become one before they migrate."""

    num_samples: NumSamples | None = None
    """|D_syn|; the bundle's own |D| when unset, of a merge the sum of its parts'."""
    eval_data: str | None = None
    """JSONL with `input` and `target`: real held-out data, only measured on, never trained on."""
    screen: Screen | None = None
    """This adapter's own synthesis.screen."""
    epochs: Epochs | None = None
    """This adapter's own distill.epochs."""
    learning_rate: float | None = Field(default=None, gt=0)
    """This adapter's own distill.learning_rate."""
    min_agreement: float | None = Field(default=None, ge=0, le=1)
    """This adapter's own gate.min_agreement."""
    prompt_template: PromptTemplate | None = None
    """This adapter's own prompt_template."""
    stop: str | None = Field(default=None, min_length=1)
    """Text at which the source adapter's answers end, for one that was never trained to end them."""
