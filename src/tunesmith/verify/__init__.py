"""An independent proof that a merged model is its base plus its adapter.  Never imports merge."""

from tunesmith.verify.certificate import (
    CERTIFICATE_FILE,
    Certificate,
    CertifiedMerge,
    CertifiedQuantization,
    Digest,
    Numerics,
    Origin,
    Recheck,
    read_certificate,
    recheck,
    tool_versions,
    write_certificate,
)
from tunesmith.verify.records import BehaviourRow, Divergence, Level, QuantizedTensor, TensorVerdict, Verdict
from tunesmith.verify.run import LEVELS, verify

__all__ = [
    "BehaviourRow",
    "CERTIFICATE_FILE",
    "Certificate",
    "CertifiedMerge",
    "CertifiedQuantization",
    "Digest",
    "Divergence",
    "LEVELS",
    "Level",
    "Numerics",
    "Origin",
    "QuantizedTensor",
    "Recheck",
    "TensorVerdict",
    "Verdict",
    "read_certificate",
    "recheck",
    "tool_versions",
    "verify",
    "write_certificate",
]
