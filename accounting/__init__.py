"""partitiond, metered usage: meters, the ledger, what is reported."""

from accounting.disk import DiskMeter, DiskUsage
from accounting.errors import AccountingError
from accounting.ledger import Ledger, LedgerReader
from accounting.model import (
    AddressUsage,
    CountReading,
    Gap,
    GaugeReading,
    PartitionUsage,
    Pass,
    ProcessReading,
    Received,
    TrafficReading,
    UsageReport,
)
from accounting.processes import ProcessMeter, ProcessScan

__all__ = [
    "AccountingError",
    "AddressUsage",
    "CountReading",
    "DiskMeter",
    "DiskUsage",
    "Gap",
    "GaugeReading",
    "Ledger",
    "LedgerReader",
    "PartitionUsage",
    "Pass",
    "ProcessMeter",
    "ProcessReading",
    "ProcessScan",
    "Received",
    "TrafficReading",
    "UsageReport",
]
