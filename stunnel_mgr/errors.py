"""The one exception of this package, so that a caller handles every failure of a tunnel in one place.

Only the command line turns it into text for people; everybody else reads the attributes.
"""


class TunnelError(Exception):
    """A tunnel that cannot be had as asked, or cannot be looked at.

    ``code`` is stable and dotted: ``tunnel.declaration`` (what was written is wrong), ``tunnel.identity``
    (certificate or key damaged), ``tunnel.render`` (tunnels that cannot stand in one configuration),
    ``tunnel.observe`` (the kernel's tables or the log cannot be read), ``tunnel.openssl`` (its library cannot
    be used). ``resource`` names the tunnel or partition, ``hint`` what to do next, ``retryable`` says whether
    the same call may succeed later, ``line`` is the line of the declaration, counted from 1.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        resource: str = "",
        hint: str = "",
        retryable: bool = False,
        line: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.resource = resource
        self.hint = hint
        self.retryable = retryable
        self.line = line
