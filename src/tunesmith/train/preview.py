"""One training row as it will be trained on, for who wants to look before anything begins."""

from __future__ import annotations

from pathlib import Path

from tunesmith.errors import DataError
from tunesmith.record import Finding, Record
from tunesmith.train.plan import Piece, shown_example
from tunesmith.train.prepare import load_tokenizer, template_of
from tunesmith.train.quiet import quiet_libraries
from tunesmith.train.recipe import Recipe
from tunesmith.train.rows import encode_rows, read_rows


class RowPreview(Record):
    """A training row.

    Attributes:
        rows: how many training rows there are.
        row: which this is, from 0.
        pieces: its text in stretches that count in the loss or do not; empty where no answer of it is left.
        tokens: its tokens, before any is cut.
        cut: whether it loses its end.
        findings: what was found in the rows, and decided of their template.
    """

    rows: int
    row: int
    pieces: tuple[Piece, ...]
    tokens: int
    cut: bool
    findings: tuple[Finding, ...]


def preview_row(recipe: Recipe, base_dir: Path, row: int) -> RowPreview:
    """Read the rows, and encode one of them.

    Args:
        recipe: what to train on, and how.
        base_dir: the base model's directory.
        row: which row, from 0.

    Raises:
        DataError: a data set that cannot be trained on, or no such row.
        RecipeError: a recipe that does not fit its rows.
        BaseModelError: the base's tokenizer cannot be loaded.
    """
    with quiet_libraries():
        rows = read_rows(recipe)
        if not 0 <= row < len(rows.train):
            raise DataError("There is no such row.", expected=f"0 to {len(rows.train) - 1}", found=row)
        tokenizer = load_tokenizer(base_dir)
        template = template_of(recipe, tokenizer, base_dir)
        try:
            encoded = encode_rows(tokenizer, [rows.train[row]], recipe=recipe)
        except DataError as error:
            raise DataError(error.what, where=f"row {row}", found=error.found, details=error.details) from error
        pieces = shown_example(tokenizer, encoded.examples[0]) if encoded.examples else ()
    return RowPreview(
        rows=len(rows.train),
        row=row,
        pieces=pieces,
        tokens=encoded.lengths[0],
        cut=encoded.cut > 0,
        findings=(*rows.health.findings, *template.findings),
    )
