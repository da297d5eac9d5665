"""Temporary."""

from cryptography import x509


def subject_of(pem: str) -> str:
    """Temporary."""
    return x509.load_pem_x509_certificate(pem.encode()).subject.rfc4514_string()
