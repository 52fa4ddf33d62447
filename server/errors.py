"""Everything that can go wrong in front of a user, as one tree, and how each error looks over HTTP."""

import json

from memdec.server.json_types import JsonObject


class MemdecError(Exception):
    """Base class: an HTTP status, OpenAI's `type` and `param`, and a message that says what to do next."""

    status = 500
    type = "InternalServerError"
    param: str | None = None
    headers: dict[str, str] | None = None
    """Further response headers."""

    def to_body(self) -> JsonObject:
        """The error as OpenAI's JSON object."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.status}}

    def to_json(self) -> str:
        """The same as JSON text, for code without a web framework."""
        return json.dumps(self.to_body())


class StartupError(MemdecError):
    """The server can't start with these models or options."""


class RequestError(MemdecError):
    """A request that can't be served as it stands."""

    status, type = 400, "BadRequestError"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param or self.param


class UnknownDomain(RequestError):
    """No decoder is loaded under that name."""

    status, type, param = 404, "NotFoundError", "domain"


class ConflictingChoice(RequestError):
    """Header, body and model alias name different things."""


class BadLambda(RequestError):
    """Lambda isn't a number from 0 to 1."""

    param = "lambda"


class BadMode(RequestError):
    """The memory mode doesn't exist or can't be used with this request."""

    param = "memory"


class NoSuchMemory(BadMode):
    """The mode needs a decoder or an n-gram memory, and the domain has none."""


class NoDatastore(NoSuchMemory):
    """A retrieval mode was asked for, but the domain has no datastore."""


class Unauthorized(RequestError):
    """The API key is missing or wrong."""

    status, type = 401, "AuthenticationError"
    headers = {"WWW-Authenticate": "Bearer"}  # noqa: RUF012


class Forbidden(RequestError):
    """The API key is valid, but not allowed to do this."""

    status, type = 403, "PermissionDeniedError"


class DomainNotAllowed(Forbidden):
    """The domain exists, but not for this API key."""

    param = "domain"


class TooManyRequests(RequestError):
    """The API key has as many requests under way as it may."""

    status, type = 429, "RateLimitError"


class UnknownModel(RequestError):
    """No model or alias of that name."""

    status, type, param = 404, "NotFoundError", "model"


class NotServed(RequestError):
    """A path that other servers have and this one hasn't."""

    status, type = 404, "NotFoundError"


class UnknownResponse(RequestError):
    """No response of that id is stored, or it is another API key's."""

    status, type = 404, "NotFoundError"


class HeadersTooLarge(RequestError):
    """The request's headers are over the limit."""

    status, type = 431, "RequestHeaderFieldsTooLarge"


class HeadersTooSlow(RequestError):
    """The request's headers did not arrive in time."""

    status, type = 408, "RequestTimeout"


class BodyTooSlow(RequestError):
    """The request's body did not arrive in time."""

    status, type = 408, "RequestTimeout"


class AdminKeyNeeded(Unauthorized):
    """Domains are changed with the admin key alone."""


class BadPackage(RequestError):
    """A decoder that can't be loaded beside this base."""

    param = "path"


class OutsideRoots(RequestError):
    """A path outside the folders that decoders may be loaded from."""

    status, type, param = 403, "PermissionDeniedError", "path"


class NoSlot(RequestError):
    """As many decoders are loaded as there is room for."""

    status, type, param = 409, "ConflictError", "name"


class DomainStays(RequestError):
    """A domain that can't be unloaded."""

    status, type, param = 409, "ConflictError", "name"


class BodyTooLarge(RequestError):
    """The request's body is over the limit."""

    status, type = 413, "RequestEntityTooLarge"


class ShuttingDown(MemdecError):
    """The server drains: requests under way finish, new ones are refused."""

    status, type = 503, "ServiceUnavailableError"


class QueueFull(MemdecError):
    """The server has as many requests under way and waiting as it takes."""

    status, type = 503, "ServiceUnavailableError"


def cut(text: str, most: int) -> str:
    """The text, or its beginning and end with the middle left out, so that about `most` characters remain."""
    if len(text) <= most:
        return text
    return f"{text[: most * 2 // 3]} [… {len(text) - most:,} characters …] {text[len(text) - most // 3 :]}"
