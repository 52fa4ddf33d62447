"""The server's checked and frozen settings: all that configures engine and app besides vLLM's own arguments."""

from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import FastAPI

from memdec.server.api.keys import Key
from memdec.server.api.limits import Limits
from memdec.server.checked_models import Models
from memdec.server.engine.settings import UpdateOptions


@dataclass(frozen=True)
class Settings:
    """Made once, by memdec.server.launch; nothing is added later."""

    models: Models
    limits: Limits = field(default_factory=Limits)
    keys: tuple[Key, ...] = ()
    """API keys; none: nobody is asked for one."""
    updates: UpdateOptions | None = None
    """None: the domains stay as they are."""
    baseline_sample_rate: float = 0.0
    """Share of the decoder requests that is replayed with the baselines."""


@dataclass(frozen=True)
class Web:
    """What vLLM's own options say of the app."""

    add_vllms_layers: Callable[[FastAPI], None]
    docs: bool = True
    root_path: str = ""
    """The prefix of all paths behind a proxy, as in ASGI, whether or not the proxy removes it."""
    origins: tuple[str, ...] = ()
    """Origins whose pages may read answers; these four are arguments of CORSMiddleware."""
    credentials: bool = False
    methods: tuple[str, ...] = ("*",)
    headers: tuple[str, ...] = ("*",)
    tokenizer_info: bool = False
