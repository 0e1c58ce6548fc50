"""What a directory is made of and what was proved of it, in a file that can be signed and checked by hashes alone."""

from tunesmith.verify.certificate.recheck import Recheck, recheck
from tunesmith.verify.certificate.statement import (
    CERTIFICATE_FILE,
    Certificate,
    CertifiedCodes,
    CertifiedMerge,
    CertifiedQuantization,
    Digest,
    Numerics,
    read_certificate,
)
from tunesmith.verify.certificate.write import (
    Origin,
    certified_files,
    not_written,
    tool_versions,
    verdict_of,
    write_certificate,
)

__all__ = [
    "CERTIFICATE_FILE",
    "Certificate",
    "CertifiedCodes",
    "CertifiedMerge",
    "CertifiedQuantization",
    "Digest",
    "Numerics",
    "Origin",
    "Recheck",
    "certified_files",
    "not_written",
    "read_certificate",
    "recheck",
    "tool_versions",
    "verdict_of",
    "write_certificate",
]
