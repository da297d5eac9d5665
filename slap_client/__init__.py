"""partitiond, the SLAP protocol as a node speaks it: transport, marshalling, typed documents, errors."""
