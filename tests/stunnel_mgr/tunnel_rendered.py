"""Where the tests of tunnels keep identities, and ``render`` with these."""

from functools import partial

from stunnel_mgr import render as rendering

IDENTITIES = {
    "partition": rendering.IdentityFiles("certificate.pem", "key.pem", "sha256:" + "0" * 64),
    "master": rendering.IdentityFiles("master-1.crt", "master-1.key", "sha256:" + "1" * 64),
}
render = partial(rendering.render, identities=IDENTITIES)
