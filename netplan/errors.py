"""The one exception of this package, shaped like that of every other package of partitiond."""


class NetplanError(Exception):
    """Something about the node's network failed or was refused.

    ``code`` is stable and dotted (``network.name_taken``), ``resource`` names the thing (``tap/slaptap3``),
    ``hint`` says what to do next, ``retryable`` whether the same try can succeed later without anybody
    changing anything.

    Codes: ``network.address_collision address_taken duplicate invalid name_taken no_bridge no_interface
    no_library no_tun prefix_too_small range_taken tap``, ``network.netlink`` (the kernel refused a request),
    ``network.packet_filter`` (nft, or iptables, refused a change), ``network.blocked`` (left undone because the packet
    filter could not be loaded), ``network.sysctl``, ``network.bpf`` (the programs at the cgroup);
    ``sockets.destroy sockets.destroy_unsupported sockets.not_permitted`` (sessions that could not be cut).
    """

    def __init__(
        self, code: str, message: str, *, resource: str = "", hint: str = "", retryable: bool = False
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.resource = resource
        self.hint = hint
        self.retryable = retryable
