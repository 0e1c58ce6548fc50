"""What a fine-tune left behind: its files, logs, hyper-parameters, checkpoints and health.

Reads names, headers and logs only: never weights, never a pickle.
"""

from tunesmith.runs.files import CATALOGUE
from tunesmith.runs.open import FINAL, HELD_OUT, MANIFEST, as_run, checkpoint_of, open_run
from tunesmith.runs.records import LogRow, Run, RunCheckpoint, RunFile
from tunesmith.runs.tokenizer import TOKENIZER_FILES, tokenizer_dir

__all__ = [
    "CATALOGUE",
    "FINAL",
    "HELD_OUT",
    "LogRow",
    "MANIFEST",
    "Run",
    "RunCheckpoint",
    "RunFile",
    "TOKENIZER_FILES",
    "as_run",
    "checkpoint_of",
    "open_run",
    "tokenizer_dir",
]
