"""The one error family of this package, so that a caller needs a single ``except`` and reads stable codes."""


class AccountingError(Exception):
    """What went wrong with a reading, with the ledger or with a question to it.

    ``code`` is stable and dotted:

    =============================  ================================================================ =========
    code                           meaning                                                          retryable
    =============================  ================================================================ =========
    accounting.reading             a reading can not be true: negative, above 63 bits, given twice  no
    accounting.interval            usage was asked for an interval that ends before it starts       no
    accounting.ledger_busy         another process holds the ledger for too long                    yes
    accounting.ledger_full         no space for the ledger                                          yes
    accounting.ledger_unavailable  it can not be opened, read or written (rights, read-only, I/O)   yes
    accounting.ledger_damaged      the file is no sound database; ``Ledger.recover`` begins a new   no
    accounting.ledger_version      written by a newer partitiond, or not a ledger at all            no
    accounting.ledger_changed      another ledger took its place between reading and writing        yes
    accounting.document            there is no such document, or it is where this cannot be done    no
    accounting.report              usage that can not be reported: not TioXML, foreign, unnamed     no
    =============================  ================================================================ =========

    ``message`` is one sentence, ``resource`` the file or reading it is about, ``hint`` the next step,
    ``retryable`` says whether the same call may succeed later. Readings are absolute, so a pass that could
    not be recorded is made up for by the next one.
    """

    def __init__(
        self, code: str, message: str, *, resource: str = "", hint: str = "", retryable: bool = False
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.resource = resource
        self.hint = hint
        self.retryable = retryable

    def __str__(self) -> str:
        return self.message
