"""What a fine-tune left behind: its files, logs, hyper-parameters, checkpoints and health.

Reads names, headers and logs only: never weights, never a pickle.
"""

from tunesmith.runs.cleanup import Cleaned, Cleanup, apply_cleanup, plan_cleanup
from tunesmith.runs.data import held_out_rows, training_file, training_rows
from tunesmith.runs.files import CATALOGUE
from tunesmith.runs.open import FINAL, HELD_OUT, as_run, checkpoint_of, open_run, training_log
from tunesmith.runs.records import LogRow, Overruled, Run, RunCheckpoint, RunFile, Setting
from tunesmith.runs.tokenizer import TOKENIZER_FILES, tokenizer_dir
from tunesmith.runs.tools import MANIFEST

__all__ = [
    "held_out_rows",
    "training_file",
    "training_rows",
    "CATALOGUE",
    "Cleaned",
    "Cleanup",
    "FINAL",
    "HELD_OUT",
    "LogRow",
    "MANIFEST",
    "Overruled",
    "Run",
    "RunCheckpoint",
    "RunFile",
    "Setting",
    "TOKENIZER_FILES",
    "apply_cleanup",
    "as_run",
    "checkpoint_of",
    "open_run",
    "plan_cleanup",
    "tokenizer_dir",
    "training_log",
]
