"""One hierarchy of exceptions, so that a caller can tell apart what it can do about them."""


class MTGRError(Exception):
    """Base of every error this package raises on purpose; its message is one sentence that says what to do."""


class ConfigurationError(MTGRError):
    """A configuration, schema, or checkpoint is invalid or does not fit its neighbours."""


class InvalidRequestError(MTGRError):
    """The request is wrong and will stay wrong: fix it, do not retry (INVALID_ARGUMENT)."""


class UnavailableError(MTGRError):
    """Nothing can serve the request now: a retry or another strategy may help (UNAVAILABLE)."""


class RequestTimeoutError(MTGRError):
    """No answer came within the caller's time limit (DEADLINE_EXCEEDED)."""


class ServerError(MTGRError):
    """The server answered with an error that is neither the caller's fault nor a lack of capacity."""
