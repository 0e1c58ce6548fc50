"""The record of an evaluation: measures, each with a figure a variant."""

from __future__ import annotations

from typing import Literal

from tunesmith.compare.intervals import CONFIDENCE, Estimate, Verdict
from tunesmith.compare.records import Reply, VariantInfo
from tunesmith.conversations import Conversation
from tunesmith.models import Capabilities, GenerationSettings
from tunesmith.record import Finding, Part, Record

Section = Literal["effect", "damage", "memorisation"]
Unit = Literal["nats", "perplexity", "points", "share", "ratio", "score"]


class Figure(Part):
    """A measure of one variant.

    Attributes:
        variant: its name.
        value: over all rows, with its own 95 % interval.
        difference: variant minus base on the same rows, paired row by row; None for the base, and without it.
        verdict: what the difference says: ``better``, ``worse``, ``different`` (where neither direction is better),
            ``no_difference`` (none can be told), or ``unknown`` (too few rows).
    """

    variant: str
    value: Estimate
    difference: Estimate | None = None
    verdict: Verdict | None = None


class Measure(Part):
    """One thing that was measured of all variants.

    Attributes:
        section: what it is evidence of: the tuning's effect, what it broke, or what was learned by heart.
        name: its key: ``loss``, ``perplexity``, ``token_accuracy``, ``bleu``, ``chrf``, ``rouge_l``, ``exact_match``,
            ``length``, a scorer's name; ``general_loss`` and ``general_kl``; ``refused``, ``empty``, ``repeats``,
            ``switched_language``, ``cut``; ``verbatim_trained``, ``verbatim_held_out``, ``verbatim_more``,
            ``overfit_gap``.
        about: what of: a language of the general texts; empty where there is nothing to add.
        unit: of value and difference.
        higher_is_better: None where neither direction is.
        rows: how many rows it rests on.
        figures: one a variant.
    """

    section: Section
    name: str
    about: str = ""
    unit: Unit
    higher_is_better: bool | None
    rows: int
    figures: tuple[Figure, ...]

    def figure(self, variant: str) -> Figure | None:
        """The figure of one variant; None where there is none."""
        return next((figure for figure in self.figures if figure.variant == variant), None)


class Evaluation(Record):
    """Whether a tuning helped, what it broke, and what it learned by heart.

    Attributes:
        run: the run's directory name.
        variants: those reported, the base first where it is among them.
        candidates: the checkpoints that were chosen among; empty where there was nothing to choose.
        chosen: the checkpoint that was chosen on the first half of the rows; None where none was.
        chosen_by: why, as ``checkpoints`` says it (``clear``, ``earliest``, ``overfit`` …); None where none was.
        chosen_on_rows: rows that the choice rests on; none of them is reported on.
        rows: held-out rows that are reported on.
        rows_from: whose rows these are: ``held_out`` (kept by the run), ``given``, or ``none``.
        answered: to how many of them replies were written.
        measures: in the order they are shown.
        prompts: what was answered: held-out rows first, then general instructions, then rows of training.
        replies: what each reported variant answered.
        findings: the answer in sentences, the gravest first, and what is to be known beside it.
        comparisons: the number of variants that the confidence of each difference is shared among (Bonferroni).
        differences: how many differences to the base are shown; of so many, one in twenty leaves 0 out by chance alone.
        confidence: of all intervals.
        seed: of halves and samples.
        settings: how replies were drawn.
        engine: who answered.
    """

    run: str
    variants: tuple[VariantInfo, ...]
    candidates: tuple[str, ...] = ()
    chosen: str | None = None
    chosen_by: str | None = None
    chosen_on_rows: int = 0
    rows: int = 0
    rows_from: Literal["held_out", "given", "none"] = "none"
    answered: int = 0
    measures: tuple[Measure, ...]
    prompts: tuple[Conversation, ...] = ()
    replies: tuple[Reply, ...] = ()
    findings: tuple[Finding, ...] = ()
    comparisons: int = 1
    differences: int = 0
    confidence: float = CONFIDENCE
    seed: int = 0
    settings: GenerationSettings
    engine: Capabilities

    def of_section(self, section: Section) -> tuple[Measure, ...]:
        """The measures of one section."""
        return tuple(measure for measure in self.measures if measure.section == section)

    def measure(self, name: str, about: str = "") -> Measure | None:
        """One measure; None where it was not taken."""
        return next((one for one in self.measures if (one.name, one.about) == (name, about)), None)
