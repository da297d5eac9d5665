"""The one error family of this package, so that a caller needs a single ``except`` and reads stable codes."""


class SlapError(Exception):
    """What went wrong between us and the master, or with what the master said.

    ``code`` is stable and dotted:

    ====================  =========================================================== =========
    code                  meaning                                                     retryable
    ====================  =========================================================== =========
    slap.unreachable      no connection, or it was lost in mid-answer                 yes
    slap.timeout          no complete answer in time                                  yes
    slap.unavailable      HTTP 5xx, a cold cache included; 429, too many requests     yes
    slap.not_ready        HTTP 408                                                    yes
    slap.not_found        HTTP 404 (may be a bug of the master: never a destroy)      no
    slap.refused          any other HTTP 4xx, and redirects                           no
    slap.tls              no trusted TLS connection, or our own pair is unusable      no
    slap.garbage          an answer that can not be read                              no
    slap.destroy_refused  the master will not let go of a partition or software yet   yes
    slap.value            what *we* were given to send or connect to is unusable      no
    ====================  =========================================================== =========

    ``message`` is one sentence, ``resource`` says what it is about (master URL and endpoint, never with
    credentials), ``hint`` is the next step, ``retryable`` says whether the same call may succeed later.
    ``status`` is the HTTP status that was answered, None where none was; ``unsent``: the request never left, so that
    the master has certainly not acted on it. ``retry_after``: so many seconds the master asked us to wait, or None.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        resource: str = "",
        hint: str = "",
        retryable: bool = False,
        status: int | None = None,
        unsent: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.resource = resource
        self.hint = hint
        self.retryable = retryable
        self.status = status
        self.unsent = unsent
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message
