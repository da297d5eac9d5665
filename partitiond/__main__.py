"""``python -I -m partitiond``."""

import sys

from partitiond.cli import main

sys.exit(main())
