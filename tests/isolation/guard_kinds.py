"""All kinds of frames of the spoof matrix."""

from guard_kinds_addresses import ARPS, MACS, SOURCES
from guard_kinds_discovery import NEIGHBOURS
from guard_kinds_protocols import FRAMES, PROTOCOLS

KINDS = (*SOURCES, *MACS, *ARPS, *NEIGHBOURS, *PROTOCOLS, *FRAMES)
