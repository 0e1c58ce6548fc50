"""An independent proof that a merged model is its base plus its adapter.  Never imports merge."""

from tunesmith.verify.records import BehaviourRow, Level, TensorVerdict, Verdict

__all__ = ["BehaviourRow", "Level", "TensorVerdict", "Verdict"]
