"""The composition root: configuration, users, software, instances, daemon, control, command line."""

__version__ = "0.1.0"
