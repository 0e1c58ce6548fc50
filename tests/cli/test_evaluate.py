"""``tunesmith evaluate``: the answer, a table a section, and one document with ``--json`` or ``--out``."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import tunesmith as ts
from tests.cli.conftest import Cli, Result, tree
from tests.report.conftest import evaluation_of, measured
from tests.report.test_html import HOSTILE
from tunesmith.cli.app import app
from tunesmith.cli.evaluate import _next, show_evaluation
from tunesmith.cli.screen import Screen

QUICK = ("--dtype", "fp32", "--max-new-tokens", "4", "--answers", "3", "--no-general")
ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows with answers."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"instruction": f"Question {i}?", "output": f"Answer {i}, and no more."} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def done(cli: Cli, run_dir: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """An evaluation of base and final, as JSON on stdout and as Markdown."""
    out = tmp_path_factory.mktemp("out") / "evaluation.md"
    options = ("--variants", "base,final", "--data", rows, "--training", rows, "--out", out, "--json", *QUICK)
    return cli("evaluate", run_dir, *options), out


class Terminal(Screen):
    """A terminal of so many columns, without colours, that keeps what it is shown."""

    def __init__(self, width: int | None) -> None:
        self.kept = io.StringIO()
        Console.__init__(
            self,
            file=self.kept,
            force_terminal=width is not None,
            width=width or 1 << 14,
            color_system=None,
            highlight=False,
            emoji=False,
            markup=False,
        )
        self.soft_wrap = width is None

    @property
    def lines(self) -> list[str]:
        """What it shows, line by line."""
        return [line.rstrip() for line in self.kept.getvalue().splitlines()]


def shown(evaluation: ts.Evaluation, width: int | None = None) -> list[str]:
    """What a terminal of that width shows of an evaluation; None for a pipe."""
    terminal = Terminal(width)
    show_evaluation(terminal, evaluation)
    return terminal.lines


def test_json_is_the_record_and_the_file_is_written_beside_it(done: tuple[Result, Path]) -> None:
    """Progress goes to stderr, one document to stdout, and Markdown into the file."""
    result, out = done
    assert result.code == 0, result.err
    evaluation = ts.Evaluation.model_validate_json(result.out)
    assert [variant.name for variant in evaluation.variants] == ["base", "final"]
    assert (evaluation.rows, evaluation.rows_from, evaluation.answered) == (12, "given", 3)
    assert evaluation.measure("loss") is not None
    assert evaluation.measure("verbatim_trained") is not None
    assert not evaluation.of_section("damage")
    assert out.read_text(encoding="utf-8") == ts.evaluation_markdown(evaluation)
    assert ESCAPE not in result.err
    assert "score ..." in result.err


def test_a_pipe_gets_the_answer_the_tables_and_the_next_command(
    run_dir: Path, rows: Path, done: tuple[Result, Path]
) -> None:
    """Every finding is a line, every measure is a line with the figures of the record, and a command ends it."""
    options = ["--variants", "base,final", "--data", str(rows), "--training", str(rows), *QUICK]
    ran = CliRunner().invoke(app, ["evaluate", str(run_dir), *options], catch_exceptions=False)
    assert ran.exit_code == 0, ran.stderr
    evaluation = ts.Evaluation.model_validate_json(done[0].out)
    for finding in evaluation.findings:
        assert any(ts.finding_text(finding) in line for line in ran.stdout.splitlines())
    loss = evaluation.measure("loss")
    assert loss is not None
    figure = loss.figure("final")
    assert figure is not None
    assert figure.difference is not None
    assert figure.verdict is not None
    (line,) = (line for line in ran.stdout.splitlines() if line.startswith("loss "))
    for told in (f"{figure.value.value:.3f}", ts.text(f"evaluation.{figure.verdict}"), "12"):
        assert told in line
    assert "Next: tunesmith " in ran.stdout.splitlines()[-1]
    assert ESCAPE not in ran.stdout


def test_an_evaluation_leaves_the_run_as_it_was(cli: Cli, own_run: Path, rows: Path) -> None:
    """Nothing is written beside the adapter, and an unfit name for the output is refused before any work."""
    before = tree(own_run)
    refused = cli("evaluate", own_run, "--data", rows, "--out", own_run / "evaluation.txt", *QUICK)
    assert refused.code == 2
    assert ".html" in refused.err
    assert "load ..." not in refused.err
    ran = cli("evaluate", own_run, "--variants", "base,final", "--data", rows, *QUICK)
    assert ran.code == 0, ran.err
    assert tree(own_run) == before


def test_a_scorer_that_is_not_there_is_the_users_to_mend(cli: Cli, run_dir: Path, rows: Path) -> None:
    """It is looked for before a model is loaded."""
    refused = cli("evaluate", run_dir, "--data", rows, "--scorer", "no_such_module:judge", *QUICK)
    assert refused.code == 2
    assert "no_such_module" in refused.err
    assert "load ..." not in refused.err


def test_whether_it_helped_comes_before_all_else() -> None:
    """Then what is grave; what is to be known of the engine stands below the tables."""
    lines = shown(evaluation_of())
    assert lines[0].startswith("Good: The fine-tune helped")
    assert lines[1].startswith("Warning: It forgot some Chinese")
    (engine,) = (place for place, line in enumerate(lines) if line.startswith("Note: The arithmetic is bfloat16"))
    assert engine > lines.index("Learned by heart")


def test_every_measure_is_one_line_in_a_pipe() -> None:
    """With the base's figure, its own, the difference, its interval, the verdict in words, and the rows."""
    lines = shown(evaluation_of())
    row = {line.split("  ")[0]: re.split(r"\s{2,}", line) for line in lines}
    assert row["loss"] == ["loss", "2.514", "1.203", "-1.311", "-1.411 to -1.211", "▲ better", "24"]
    assert row["perplexity"][3:5] == ["-73.0%", "-83.0% to -63.0%"]
    assert row["cut off"] == ["cut off", "5.0%", "35.0%", "+30.0 pp", "+20.0 to +40.0 pp", "▼ worse", "60"]
    assert row["BLEU"][5] == "≈ no difference"
    assert row["length"][5] == "◆ different"
    assert row["judges:polite"][4:6] == ["·", "? unknown"]
    assert row["moved by (KL), Chinese"][1:5] == ["·", "0.210", "·", "0.160 to 0.260"]
    heads = [re.split(r"\s{2,}", line) for line in lines if line.startswith("measure")]
    assert heads == [["measure", "base", "final", "difference", "95 % interval", "verdict", "rows"]] * 3
    assert any("8 differences are shown" in line for line in lines)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("variants", [("final",), ("checkpoint-100", "final")])
def test_a_terminal_loses_nothing_at_its_edge(width: int, variants: tuple[str, ...]) -> None:
    """Eighty columns hold every figure and every verdict whole; an interval may stand below its difference."""
    lines = shown(evaluation_of(variants), width)
    assert max(map(len, lines)) <= width
    told = "\n".join(lines)
    assert "…" not in told
    for figure in ("-1.311", "-1.411 to -1.211", "+20.0 to +40.0 pp", "▲ better", "▼ worse", "≈ no difference"):
        assert told.count(figure) >= len(variants), figure
    assert all(name in told for name in variants)


def test_a_long_name_gives_way_to_the_figures() -> None:
    """A variant may be named by a path: it is shortened on a terminal, and whole in a pipe."""
    name = "/data/models/" + "x" * 90
    for variants in ((name, "final"), (name,)):
        narrow, pipe = shown(evaluation_of(variants), 80), shown(evaluation_of(variants))
        assert max(map(len, narrow)) <= 80
        assert "-1.411 to -1.211" in "\n".join(narrow)
        assert any(line.startswith("perplexity") for line in narrow)
        assert name in "\n".join(pipe)


def test_text_from_outside_moves_no_cursor() -> None:
    """Names of variants, scorers and servers are cleaned."""
    evaluation = evaluation_of((HOSTILE,))
    scorer = measured("effect", HOSTILE, 1, 2, unit="score", better=True, variants=(HOSTILE,))
    for width in (120, None):
        told = "\n".join(shown(evaluation.model_copy(update={"measures": (scorer, *evaluation.measures)}), width))
        assert not set("\x00\x1b\u202e\u2066") & set(told)
        assert any(line.startswith("<script>") and "\ufffd[31m" in line for line in told.splitlines())


def test_an_evaluation_without_a_base_or_with_the_base_alone_is_shown() -> None:
    """There are figures, and no differences."""
    evaluation = evaluation_of()
    measure = evaluation.measures[0]
    (base, final) = measure.figures
    plain = final.model_copy(update={"difference": None, "verdict": None})
    for figure, info in ((base, evaluation.variants[0]), (plain, evaluation.variants[1])):
        alone = evaluation.model_copy(
            update={
                "measures": (measure.model_copy(update={"figures": (figure,)}),),
                "variants": (info,),
                "findings": (),
                "differences": 0,
            }
        )
        lines = shown(alone)
        (head,) = (re.split(r"\s{2,}", line) for line in lines if line.startswith("measure"))
        assert head[1] == info.name
        assert not any("differences are shown" in line for line in lines)


@pytest.mark.parametrize(
    ("codes", "command"),
    [
        (("helped",), "tunesmith compare 'out/my run' --variants base,final --base demo"),
        (("hurt", "more_cut"), "tunesmith checkpoints 'out/my run' --base demo"),
        (("no_difference",), "tunesmith evaluate 'out/my run' --data FILE --base demo"),
    ],
)
def test_the_next_command_follows_from_the_answer(codes: tuple[str, ...], command: str) -> None:
    """It can be typed as it stands."""
    found = tuple(ts.Finding(code=f"evaluation_{code}", severity="info") for code in codes)
    terminal = Terminal(None)
    _next(terminal, evaluation_of().model_copy(update={"findings": found}), run=Path("out/my run"), base="demo")
    assert terminal.lines == [f"Next: {command}"]
