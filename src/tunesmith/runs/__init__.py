"""What a fine-tune left behind: its files, logs, hyper-parameters, checkpoints and health.

Reads names, headers and logs only: never weights, never a pickle.
"""

from tunesmith.runs.records import LogRow, Run, RunCheckpoint, RunFile

__all__ = ["LogRow", "Run", "RunCheckpoint", "RunFile"]
