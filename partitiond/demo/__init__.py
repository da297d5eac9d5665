"""The demonstration: the whole way through on one machine, with a real master, in private namespaces."""
