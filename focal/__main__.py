"""`python -m focal` is the `focal` command."""

import sys

from focal.cli import main

sys.exit(main())
