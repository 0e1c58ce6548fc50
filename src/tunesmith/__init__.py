"""Tunesmith: use, prove and ship a LoRA fine-tune.

    import tunesmith as ts

    run = ts.open_run("out/security")
    plan = ts.plan_merge(run, out="out/merged")
    merged = ts.merge(plan)
    verdict = ts.verify(run, merged)

Every name is loaded when it is first used, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.adapter import AdapterFacts as AdapterFacts
    from tunesmith.adapter import KindFacts as KindFacts
    from tunesmith.adapter import ModuleFacts as ModuleFacts
    from tunesmith.api.comparing import checkpoints as checkpoints
    from tunesmith.api.comparing import compare as compare
    from tunesmith.api.comparing import write_comparison as write_comparison
    from tunesmith.api.drifting import compare_schemes as compare_schemes
    from tunesmith.api.drifting import drift as drift
    from tunesmith.api.drifting import write_drift as write_drift
    from tunesmith.api.engines import ChatTurn as ChatTurn
    from tunesmith.api.engines import attached_variant as attached_variant
    from tunesmith.api.engines import compute_dtype as compute_dtype
    from tunesmith.api.engines import load_engine as load_engine
    from tunesmith.api.engines import rendered_prompt as rendered_prompt
    from tunesmith.api.evaluating import evaluate as evaluate
    from tunesmith.api.evaluating import write_evaluation as write_evaluation
    from tunesmith.api.gguf import GgufOutcome as GgufOutcome
    from tunesmith.api.gguf import verify_gguf as verify_gguf
    from tunesmith.api.gguf import write_gguf as write_gguf
    from tunesmith.api.inspecting import Inspection as Inspection
    from tunesmith.api.inspecting import inspect as inspect
    from tunesmith.api.inspecting import write_inspection as write_inspection
    from tunesmith.api.likelihoods import TokenChance as TokenChance
    from tunesmith.api.likelihoods import continue_tokens as continue_tokens
    from tunesmith.api.likelihoods import token_chances as token_chances
    from tunesmith.api.likelihoods import token_texts as token_texts
    from tunesmith.api.merging import merge as merge
    from tunesmith.api.places import output_file as output_file
    from tunesmith.api.pushing import plan_push as plan_push
    from tunesmith.api.pushing import push as push
    from tunesmith.api.quantizing import quantize as quantize
    from tunesmith.api.reporting import Report as Report
    from tunesmith.api.reporting import report as report
    from tunesmith.api.serving import serve_command as serve_command
    from tunesmith.api.training import plan_training as plan_training
    from tunesmith.api.training import preview_row as preview_row
    from tunesmith.api.training import read_recipe as read_recipe
    from tunesmith.api.training import recipe_keys as recipe_keys
    from tunesmith.api.training import train as train
    from tunesmith.api.training import write_recipe as write_recipe
    from tunesmith.api.verifying import recheck as recheck
    from tunesmith.api.verifying import verdict_sentence as verdict_sentence
    from tunesmith.api.verifying import verify as verify
    from tunesmith.compare import BlindVote as BlindVote
    from tunesmith.compare import Candidate as Candidate
    from tunesmith.compare import CheckpointChoice as CheckpointChoice
    from tunesmith.compare import Comparison as Comparison
    from tunesmith.compare import Drift as Drift
    from tunesmith.compare import DriftRow as DriftRow
    from tunesmith.compare import Estimate as Estimate
    from tunesmith.compare import Evaluation as Evaluation
    from tunesmith.compare import Figure as Figure
    from tunesmith.compare import Marks as Marks
    from tunesmith.compare import Measure as Measure
    from tunesmith.compare import Reply as Reply
    from tunesmith.compare import VariantInfo as VariantInfo
    from tunesmith.compare import VoteFile as VoteFile
    from tunesmith.compare import Voting as Voting
    from tunesmith.compare import filtered as filtered
    from tunesmith.compare import marks_of as marks_of
    from tunesmith.compare import similarity as similarity
    from tunesmith.compare import to_csv as to_csv
    from tunesmith.compare import to_markdown as to_markdown
    from tunesmith.compare import word_diff as word_diff
    from tunesmith.conversations import Conversation as Conversation
    from tunesmith.conversations import Message as Message
    from tunesmith.conversations import read_conversations as read_conversations
    from tunesmith.demo import DemoResult as DemoResult
    from tunesmith.demo import demo as demo
    from tunesmith.doctor import Health as Health
    from tunesmith.doctor import doctor as doctor
    from tunesmith.errors import Cancelled as Cancelled
    from tunesmith.errors import MissingExtraError as MissingExtraError
    from tunesmith.errors import TunesmithError as TunesmithError
    from tunesmith.executors import executor_of as executor_of
    from tunesmith.export.gguf import GgufExport as GgufExport
    from tunesmith.export.push import Pushed as Pushed
    from tunesmith.export.push import PushPlan as PushPlan
    from tunesmith.export.quantize import QuantizationPlan as QuantizationPlan
    from tunesmith.export.quantize import Quantized as Quantized
    from tunesmith.export.quantize import plan_quantization as plan_quantization
    from tunesmith.export.serving import ServeCommand as ServeCommand
    from tunesmith.merge import Forecast as Forecast
    from tunesmith.merge import Merged as Merged
    from tunesmith.merge import MergePlan as MergePlan
    from tunesmith.merge import plan_merge as plan_merge
    from tunesmith.models import Capabilities as Capabilities
    from tunesmith.models import Engine as Engine
    from tunesmith.models import Generation as Generation
    from tunesmith.models import GenerationSettings as GenerationSettings
    from tunesmith.models import RenderedPrompt as RenderedPrompt
    from tunesmith.models import Request as Request
    from tunesmith.progress import Cancellation as Cancellation
    from tunesmith.progress import Progress as Progress
    from tunesmith.record import Finding as Finding
    from tunesmith.report import LANGUAGES as LANGUAGES
    from tunesmith.report import drift_spec as drift_spec
    from tunesmith.report import evaluation_markdown as evaluation_markdown
    from tunesmith.report import finding_text as finding_text
    from tunesmith.report import heatmap_spec as heatmap_spec
    from tunesmith.report import loss_spec as loss_spec
    from tunesmith.report import templates as templates
    from tunesmith.report import text as text
    from tunesmith.runs import Cleaned as Cleaned
    from tunesmith.runs import Cleanup as Cleanup
    from tunesmith.runs import Run as Run
    from tunesmith.runs import RunFile as RunFile
    from tunesmith.runs import apply_cleanup as apply_cleanup
    from tunesmith.runs import open_run as open_run
    from tunesmith.runs import plan_cleanup as plan_cleanup
    from tunesmith.runs import training_log as training_log
    from tunesmith.train import RecipeKey as RecipeKey
    from tunesmith.train import RecipeText as RecipeText
    from tunesmith.train import RowPreview as RowPreview
    from tunesmith.train import TrainingPlan as TrainingPlan
    from tunesmith.verify import Recheck as Recheck
    from tunesmith.verify import Verdict as Verdict
    from tunesmith.verify.gguf import GgufVerdict as GgufVerdict

__version__ = "0.1.0"

_HOME = {
    "AdapterFacts": "adapter",
    "BlindVote": "compare",
    "Cancellation": "progress",
    "Cancelled": "errors",
    "Candidate": "compare",
    "Capabilities": "models",
    "ChatTurn": "api.engines",
    "CheckpointChoice": "compare",
    "Cleaned": "runs",
    "Cleanup": "runs",
    "Comparison": "compare",
    "Conversation": "conversations",
    "DemoResult": "demo",
    "Drift": "compare",
    "DriftRow": "compare",
    "Engine": "models",
    "Estimate": "compare",
    "Evaluation": "compare",
    "Figure": "compare",
    "Finding": "record",
    "Forecast": "merge",
    "Generation": "models",
    "GenerationSettings": "models",
    "GgufExport": "export.gguf",
    "GgufOutcome": "api.gguf",
    "GgufVerdict": "verify.gguf",
    "Health": "doctor",
    "Inspection": "api.inspecting",
    "KindFacts": "adapter",
    "LANGUAGES": "report",
    "Marks": "compare",
    "Measure": "compare",
    "MergePlan": "merge",
    "Merged": "merge",
    "Message": "conversations",
    "MissingExtraError": "errors",
    "ModuleFacts": "adapter",
    "Progress": "progress",
    "PushPlan": "export.push",
    "Pushed": "export.push",
    "QuantizationPlan": "export.quantize",
    "Quantized": "export.quantize",
    "Recheck": "verify",
    "RecipeKey": "train",
    "RecipeText": "train",
    "RenderedPrompt": "models",
    "Reply": "compare",
    "Report": "api.reporting",
    "Request": "models",
    "Run": "runs",
    "RowPreview": "train",
    "RunFile": "runs",
    "ServeCommand": "export.serving",
    "TokenChance": "api.likelihoods",
    "TunesmithError": "errors",
    "VariantInfo": "compare",
    "VoteFile": "compare",
    "Voting": "compare",
    "TrainingPlan": "train",
    "Verdict": "verify",
    "apply_cleanup": "runs",
    "attached_variant": "api.engines",
    "checkpoints": "api.comparing",
    "compare": "api.comparing",
    "compare_schemes": "api.drifting",
    "compute_dtype": "api.engines",
    "continue_tokens": "api.likelihoods",
    "demo": "demo",
    "doctor": "doctor",
    "drift": "api.drifting",
    "drift_spec": "report",
    "evaluate": "api.evaluating",
    "evaluation_markdown": "report",
    "executor_of": "executors",
    "filtered": "compare",
    "finding_text": "report",
    "heatmap_spec": "report",
    "inspect": "api.inspecting",
    "load_engine": "api.engines",
    "loss_spec": "report",
    "marks_of": "compare",
    "merge": "api.merging",
    "open_run": "runs",
    "output_file": "api.places",
    "plan_cleanup": "runs",
    "plan_merge": "merge",
    "plan_push": "api.pushing",
    "plan_quantization": "export.quantize",
    "plan_training": "api.training",
    "preview_row": "api.training",
    "push": "api.pushing",
    "quantize": "api.quantizing",
    "read_conversations": "conversations",
    "read_recipe": "api.training",
    "recheck": "api.verifying",
    "recipe_keys": "api.training",
    "rendered_prompt": "api.engines",
    "report": "api.reporting",
    "serve_command": "api.serving",
    "similarity": "compare",
    "templates": "report",
    "text": "report",
    "to_csv": "compare",
    "to_markdown": "compare",
    "token_chances": "api.likelihoods",
    "token_texts": "api.likelihoods",
    "train": "api.training",
    "training_log": "runs",
    "verdict_sentence": "api.verifying",
    "verify": "api.verifying",
    "verify_gguf": "api.gguf",
    "word_diff": "compare",
    "write_comparison": "api.comparing",
    "write_drift": "api.drifting",
    "write_evaluation": "api.evaluating",
    "write_gguf": "api.gguf",
    "write_inspection": "api.inspecting",
    "write_recipe": "api.training",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tunesmith.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Some rooms bear a verb's name; importing ``tunesmith.verify`` must not hide ``tunesmith.verify(...)``."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
