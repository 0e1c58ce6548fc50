"""An independent proof that a merged model is its base plus its adapter.  Never imports merge."""

from tunesmith.verify.records import BehaviourRow, Level, TensorVerdict, Verdict
from tunesmith.verify.run import LEVELS, verify

__all__ = ["BehaviourRow", "LEVELS", "Level", "TensorVerdict", "Verdict", "verify"]
