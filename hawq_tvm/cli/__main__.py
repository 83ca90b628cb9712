"""`python -m hawq_tvm.cli`: the command without its script."""

import sys

from . import main

sys.exit(main())
