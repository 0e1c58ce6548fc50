"""The public surface: its names, and that the command line repeats the library's defaults and adds none."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import tunesmith as ts
from tunesmith.cli.app import app
from tunesmith.web import Settings

NAMES = [
    "AdapterFacts", "BlindVote", "Cancellation", "Cancelled", "Candidate", "Capabilities", "ChatTurn",
    "CheckpointChoice", "Cleaned", "Cleanup", "Comparison", "Conversation", "DemoResult", "Drift", "DriftRow", "Engine",
    "Estimate", "Evaluation", "Figure", "Finding", "Forecast", "Generation", "GenerationSettings", "GgufExport",
    "GgufOutcome", "GgufVerdict", "Health", "Inspection", "KindFacts", "LANGUAGES", "Marks", "Measure", "MergePlan",
    "Merged", "Message", "MissingExtraError", "ModuleFacts", "Progress", "PushPlan", "Pushed", "QuantizationPlan",
    "Quantized", "Recheck", "RecipeKey", "RecipeText", "RenderedPrompt", "Reply", "Report", "Request", "RowPreview",
    "Run", "RunFile", "ServeCommand", "TokenChance", "TrainingPlan", "TunesmithError", "VariantInfo", "Verdict",
    "VoteFile", "Voting", "__version__", "apply_cleanup", "attached_variant", "checkpoints", "compare",
    "compare_schemes", "compute_dtype", "continue_tokens", "demo", "doctor", "drift", "drift_spec", "evaluate",
    "evaluation_markdown", "executor_of", "filtered", "finding_text", "heatmap_spec", "inspect", "load_engine",
    "loss_spec", "marks_of", "merge", "open_run", "output_file", "plan_cleanup", "plan_merge", "plan_push",
    "plan_quantization", "plan_training", "preview_row", "push", "quantize", "read_conversations", "read_recipe",
    "recheck", "recipe_keys", "rendered_prompt", "report", "serve_command", "similarity", "templates", "text", "to_csv",
    "to_markdown", "token_chances", "token_texts", "train", "training_log", "verdict_sentence", "verify", "verify_gguf",
    "word_diff", "write_comparison", "write_drift", "write_evaluation", "write_gguf", "write_inspection",
    "write_recipe",
]  # fmt: skip

VERBS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]

# What an option of the command line is called in the library, where that differs.
RENAMED = {
    ("serve-command", "checkpoint"): "checkpoints",
    ("gguf", "level"): "levels",
    ("gguf", "type_name"): "type",
    ("verify", "level"): "levels",
}

# Options whose default the library does not hold, each with its reason.
CLI_ONLY = {
    ("*", "as_json"): "how the answer is printed",
    ("*", "help"): "Typer's own",
    ("chat", "model"): "one of the library's models",
    ("chat", "plain"): "what is asked",
    ("chat", "prompt"): "what is asked",
    ("chat", "show_prompt"): "the library's rendered_prompt",
    ("chat", "system"): "what is asked",
    ("compare", "only"): "the library's filtered",
    ("compare", "out"): "the library returns the record",
    ("compare", "vote"): "votes are asked of a person",
    ("drift", "out"): "the library returns the record",
    ("evaluate", "out"): "the library returns the record",
    ("gguf", "check"): "what the library's verify_gguf is given",
    ("verify", "base_gguf"): "the library's verify_gguf",
    ("gguf", "out"): "required in the library; with --check nothing is written",
    ("gguf", "verify"): "the library's verify_gguf",
    ("inspect", "apply"): "the library's apply_cleanup",
    ("inspect", "cleanup"): "the library's plan_cleanup",
    ("inspect", "html"): "the library's write_inspection",
    ("inspect", "yes"): "a question to a person",
    ("merge", "dry_run"): "the library's plan_merge alone",
    ("merge", "out"): "required in both",
    ("merge", "record"): "the library returns the record",
    ("push", "dry_run"): "the library's plan_push alone",
    ("train", "dry_run"): "the library's plan_training",
    ("quantize", "compare"): "the library's compare_schemes",
    ("quantize", "dry_run"): "the library's plan_quantization alone",
    ("quantize", "out"): "required in the library; a person may compare instead",
    ("report", "out"): "required in the library; a person may leave it out",
    ("web", "open_browser"): "a browser is opened for a person",
    ("web", "port"): "where none is given the next free one is taken",
    ("web", "root"): "required by the settings; a person means the working directory",
    ("verify", "merged"): "required in the library; a person may name it by --merged",
    ("verify", "merged_dir"): "the same by another name",
    ("verify", "out"): "the library returns the record",
    ("verify", "quiet"): "how the answer is printed",
    ("verify", "run"): "required in the library; without it, ts.recheck is called",
}


def library_defaults(verb: str) -> dict[str, Any]:
    """The defaults of what a verb calls."""
    if verb == "web":
        return {name: field.default for name, field in Settings.model_fields.items()}
    other = {
        "gguf": (ts.write_gguf, ts.verify_gguf),
        "merge": (ts.plan_merge, ts.merge),
        "quantize": (ts.compare_schemes, ts.plan_quantization, ts.quantize),
        "chat": (ts.load_engine,),
        "push": (ts.plan_push, ts.push),
        "serve-command": (ts.serve_command,),
    }
    calls = other[verb] if verb in other else (getattr(ts, verb),)
    defaults = {
        name: parameter.default
        for call in calls
        for name, parameter in inspect.signature(call).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    if verb == "chat":
        (defaults["checkpoint"],) = defaults.pop("names")
        defaults |= {name: field.default for name, field in ts.GenerationSettings.model_fields.items()}
    if verb == "compare":
        defaults["variants"] = ",".join(defaults["variants"])
        defaults |= {name: field.default for name, field in ts.GenerationSettings.model_fields.items()}
        defaults["greedy"] = True  # what the library takes where no settings are given
    return defaults


def options() -> list[tuple[str, Any]]:
    """Every option and every argument that may be left out, of every verb."""
    return [(verb, option) for verb, command in VERBS.items() for option in command.params if not option.required]


@pytest.mark.parametrize(("verb", "option"), options(), ids=lambda value: getattr(value, "name", value))
def test_an_options_default_is_the_librarys(verb: str, option: Any) -> None:
    """Defaults live once; the command line may repeat them, and this holds it to them."""
    if {("*", option.name), (verb, option.name)} & set(CLI_ONLY):
        return
    expected = library_defaults(verb)[RENAMED.get((verb, option.name), option.name)]
    found = str(option.default) if isinstance(option.default, os.PathLike) else option.default
    given = [None if value in (None, (), []) else value for value in (found, expected)]  # all mean: not given
    assert given[0] == given[1]


def test_names_are_pinned() -> None:
    """A public name comes or goes on purpose only."""
    assert sorted(ts.__all__) == NAMES
    assert dir(ts) == NAMES


def test_every_name_resolves() -> None:
    """Every name can be had, and an unknown one is an AttributeError."""
    assert all(getattr(ts, name) is not None for name in ts.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fuse'"):
        _ = ts.fuse  # type: ignore[attr-defined]


def test_type_checkers_see_the_same_names() -> None:
    """What is imported under TYPE_CHECKING is what is loaded lazily."""
    source = Path(ts.__file__).read_text(encoding="utf-8")
    seen = [line.rpartition(" as ")[2] for line in source.splitlines() if line.startswith("    from tunesmith.")]
    assert sorted([*seen, "__version__"]) == NAMES


def test_verbs_are_functions_whatever_was_imported_before() -> None:
    """Some rooms bear a verb's name; importing them, in any order, hides no verb."""
    verbs = ["verify", "merge", "report", "demo", "train", "compare", "doctor"]
    code = "\n".join(
        [
            "import importlib, inspect, os, tunesmith as ts",
            "for room in os.environ['ROOMS'].split():",
            "    importlib.import_module(f'tunesmith.{room}')",
            f"    assert all(inspect.isfunction(getattr(ts, verb)) for verb in {verbs}), room",
            "from tunesmith import verify, merge, report, demo, train, compare, doctor",
            "assert all(map(inspect.isfunction, (verify, merge, report, demo, train, compare, doctor)))",
        ]
    )
    for order in (verbs, verbs[::-1]):
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "ROOMS": " ".join(order)})
    for first in ("import tunesmith.verify", "from tunesmith.verify import Verdict", "import tunesmith.merge"):
        code = f"{first}\nimport inspect, tunesmith\nassert inspect.isfunction(tunesmith.verify)\n"
        subprocess.run([sys.executable, "-c", code + "assert inspect.isfunction(tunesmith.merge)"], check=True)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_an_example_and_speaks_json(verb: str) -> None:
    """``--help`` ends in a command to copy, and every answer can be had as JSON."""
    command = VERBS[verb]
    assert f"Example: tunesmith {verb}" in command.help
    assert "--json" in itertools.chain.from_iterable(option.opts for option in command.params)


def test_no_exception_for_an_option_that_is_gone() -> None:
    """The list of options that are the command line's own holds no dead entry."""
    there = {(verb, option.name) for verb, command in VERBS.items() for option in command.params}
    assert {key for key in CLI_ONLY if key[0] != "*"} <= there
    assert set(RENAMED) <= there
