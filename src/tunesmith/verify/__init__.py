"""An independent proof that a merged model is its base plus its adapter.  Never imports merge."""

from tunesmith.verify.certificate import Origin, tool_versions, write_certificate
from tunesmith.verify.recheck import Recheck, recheck
from tunesmith.verify.records import BehaviourRow, Divergence, Level, TensorVerdict, Verdict
from tunesmith.verify.run import LEVELS, verify
from tunesmith.verify.statement import CERTIFICATE_FILE, Certificate, CertifiedMerge, Digest, Numerics, read_certificate

__all__ = [
    "BehaviourRow",
    "CERTIFICATE_FILE",
    "Certificate",
    "CertifiedMerge",
    "Digest",
    "Divergence",
    "LEVELS",
    "Level",
    "Numerics",
    "Origin",
    "Recheck",
    "TensorVerdict",
    "Verdict",
    "read_certificate",
    "recheck",
    "tool_versions",
    "verify",
    "write_certificate",
]
