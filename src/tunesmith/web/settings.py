"""What a served page is told once, when it starts."""

from __future__ import annotations

import ipaddress
import secrets
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class Settings(BaseModel):
    """How the page is served.

    Attributes:
        root: the folder that requests may read and write in; nothing outside it, but for ``run`` and ``base``.
        run: the run that is opened first; None for none.
        base: the base model of that run; None for the one that its adapter names.
        host: the address that is bound.
        port: the port that is bound; 0 for any that is free.
        token: what a client must show; made where ``host`` is not this machine's own loopback, else None.
        dtype: of the arithmetic; ``auto`` is measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path
    run: str | None = None
    base: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=7860, ge=0, le=65535)
    token: str | None = Field(default=None, min_length=1, repr=False)
    dtype: str = "auto"

    @model_validator(mode="after")
    def _settled(self) -> Settings:
        root = self.root.expanduser().resolve()
        object.__setattr__(self, "root", root)
        for name in ("run", "base"):
            object.__setattr__(self, name, _placed(getattr(self, name), root))
        if self.token is None and not is_loopback(self.host):
            object.__setattr__(self, "token", secrets.token_urlsafe(24))
        return self

    @property
    def url(self) -> str:
        """Where the page is, with the token in the part of the address that is never sent."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/" + (f"#token={self.token}" if self.token else "")


def _placed(name: str | None, root: Path) -> str | None:
    """A place of this disk, absolute: relative to the working directory, else to the root; any other name as it is."""
    found = [] if name is None else [place for place in (Path(name).expanduser(), root / name) if place.exists()]
    return str(found[0].resolve()) if found else name


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in LOOPBACK_NAMES
