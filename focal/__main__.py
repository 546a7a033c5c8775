"""`python -m focal` is the `focal` command."""

import sys

from focal.retinanet.cli import main

sys.exit(main())
