"""partitiond, encrypted bridges: tunnel declarations, identities, stunnel's configuration, log and sessions.

    declaration   text of a tenant or operator → Tunnel, or why not
    conflicts     which of several tunnels gives way
    identity      the certificate and key of a partition (imports cryptography)
    render        tunnels of one partition → the files of one stunnel
    verdict       stunnel's log → did the reload work
    sessions      the kernel's sockets → listening, live sessions
    log_follower  a log that is rotated → what was added since a place
    session_log   stunnel's log → session_records: who lives, ended, failed, was refused
    session_digest  the records of a pass → a bounded number of things to tell
    subjects      a certificate → its subject as stunnel logs it (calls libcrypto)
    revocation    certificates taken back → whose connections end
    check         a real TLS connection → does the tunnel work

Nothing is imported here: ``cryptography`` takes some 50 ms, which whoever only wants the model does not pay.
"""
