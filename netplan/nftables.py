"""libnftables through ctypes: one text, one transaction, no process.

Calls: include/nftables/libnftables.h, libnftables(3).  A context is not thread safe and opens its netlink
socket in the network namespace of the thread that makes it, so each run has its own (0.1 ms).
"""

import ctypes
from functools import cache

from netplan.errors import NetplanError

_LIBRARY = "libnftables.so.1"
_NFT_CTX_DEFAULT = 0


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise NetplanError(
            "network.no_library",
            f"cannot load {_LIBRARY}: {error}",
            resource="filter/partitiond",
            hint="install it: apt install nftables",
        ) from error
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_free.restype = None
    library.nft_ctx_set_dry_run.restype = None
    library.nft_ctx_set_dry_run.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    for name in ("nft_ctx_free", "nft_ctx_buffer_output", "nft_ctx_buffer_error"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
    library.nft_ctx_get_error_buffer.argtypes = [ctypes.c_void_p]
    return library


@cache
def knows_persist() -> bool:
    """Whether libnftables knows tables that outlive their owner (since 1.1.0; said by a dry run).

    An older ``nft -j list`` looks behind the end of an array for the name of that flag (src/json.c): no table of
    ours may do that to the tools of others.
    """
    library = _library()
    context = library.nft_ctx_new(_NFT_CTX_DEFAULT)
    if not context:
        return False
    try:
        library.nft_ctx_buffer_error(context)
        library.nft_ctx_set_dry_run(context, True)
        text = b"add table inet partitiond-dry { flags persist; }\n"
        return bool(library.nft_run_cmd_from_buffer(context, text) == 0)
    finally:
        library.nft_ctx_free(context)


def run(text: str) -> None:
    """Run nft commands as one transaction: all or nothing.

    Raises ``network.packet_filter`` with nft's own words, ``network.no_library`` without libnftables.
    """
    library = _library()
    context = library.nft_ctx_new(_NFT_CTX_DEFAULT)
    if not context:
        raise NetplanError("network.packet_filter", "libnftables gives no context")
    try:
        library.nft_ctx_buffer_output(context)
        library.nft_ctx_buffer_error(context)
        if library.nft_run_cmd_from_buffer(context, text.encode()) != 0:
            words = (library.nft_ctx_get_error_buffer(context) or b"").decode(errors="replace")
            raise NetplanError(
                "network.packet_filter",
                f"nft refused the transaction: {words.strip()[:2000]}",
                resource="filter/partitiond",
                hint="the rules that were loaded before are still in force",
            )
    finally:
        library.nft_ctx_free(context)
