"""API keys: who a client is, and which domains it may use."""

import hashlib
import hmac
import re
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from memdec.decoders.reading.names import DOMAIN, DOMAIN_RULE
from memdec.server.errors import StartupError

FORMAT = "KEY [name=NAME] [domains=A,B] [concurrent=N] [tokens=N]"


@dataclass(frozen=True)
class Key:
    """One API key. The secret itself isn't kept."""

    digest: bytes = field(repr=False)
    name: str
    """What it is called in logs."""
    domains: frozenset[str] | None = None
    """Domains it may use besides the base; None: all."""
    concurrent: int | None = None
    """Choices under way at once; None: the server's --max-concurrent-per-key."""
    tokens: int | None = None
    """Tokens under way, prompts and max_tokens; None: the server's --max-tokens-per-key."""

    @classmethod
    def of(
        cls, secret: str, name: str, domains: frozenset[str] | None = None, concurrent: int | None = None, tokens: int | None = None
    ) -> "Key":
        """A key from its secret."""
        return cls(digest(secret.encode()), name, domains, concurrent, tokens)

    def may_use(self, domain: str) -> bool:
        """Whether requests with this key may name a domain."""
        return self.domains is None or domain in self.domains


def digest(secret: bytes) -> bytes:
    """SHA-256 of a secret. Digests are compared instead of secrets: all have one length, so each comparison takes the same time."""
    return hashlib.sha256(secret).digest()


def find(keys: Iterable[Key], authorization: bytes) -> Key | None:
    """The key that an Authorization header carries as a bearer token; every key is compared, in constant time."""
    scheme, _, token = authorization.partition(b" ")
    sent = digest(token.strip())
    matching = [key for key in keys if hmac.compare_digest(sent, key.digest)]
    return matching[0] if matching and scheme.lower() == b"bearer" else None


def read_keys(path: Path) -> list[Key]:
    """The keys of a file, one a line; `#` begins a comment line. Raises StartupError, one line, which tells no key."""
    try:
        mode, lines = path.stat().st_mode, path.read_text().splitlines()
    except OSError as error:
        raise StartupError(f"--api-key-file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise StartupError(f"--api-key-file {path}: not UTF-8 text") from None
    if mode & stat.S_IROTH:
        print(f"memdec: warning: --api-key-file {path}: everybody on this machine can read it; chmod 600 it", file=sys.stderr, flush=True)
    keys: list[Key] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                key = _parse(line, f"line-{number}")
            except ValueError as error:
                raise StartupError(f"--api-key-file {path}, line {number}: {error}; wanted {FORMAT}") from None
            for other in keys:
                if other.digest == key.digest or other.name == key.name:
                    same = "key" if other.digest == key.digest else f"name {key.name!r}"
                    raise StartupError(f"--api-key-file {path}, line {number}: its {same} is given twice")
            keys.append(key)
    if not keys:
        raise StartupError(f"--api-key-file {path}: no key in it; wanted lines of {FORMAT}")
    return keys


def _parse(line: str, name: str) -> Key:
    """One line. Raises ValueError without the key in its text."""
    secret, *options = line.split()
    if not re.fullmatch(r"[!-~]+", secret):
        raise ValueError("the key has other than printable ASCII characters, which no header can carry")
    domains: frozenset[str] | None = None
    numbers: dict[str, int] = {}
    seen = set()
    for number, option in enumerate(options, 1):
        what, equals, value = option.partition("=")
        if not equals or what not in ("name", "domains", "concurrent", "tokens") or what in seen:
            raise ValueError(f"option {number} is not one of name=, domains=, concurrent= or tokens=, each at most once")
        seen.add(what)
        if what == "name":
            name = _named(value, "name")
        elif what == "domains":
            domains = frozenset(_named(domain, "domain") for domain in value.split(",") if value)
        elif not value.isdecimal() or int(value) < 1:
            raise ValueError(f"{what} is not a whole number from 1")
        else:
            numbers[what] = int(value)
    return Key.of(secret, name, domains, **numbers)


def _named(value: str, what: str) -> str:
    if not DOMAIN.fullmatch(value):
        raise ValueError(f"the {what} {value[:80]!r} must be {DOMAIN_RULE}")
    return value
