"""`python -m hawq_tvm.cli`: the command without its script."""

import sys

from .commands import main

sys.exit(main())
