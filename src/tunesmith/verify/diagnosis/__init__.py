"""Why a merged model differs, and how to mend it."""

from tunesmith.verify.diagnosis.causes import diagnose_findings, diagnose_weights

__all__ = [
    "diagnose_findings",
    "diagnose_weights",
]
