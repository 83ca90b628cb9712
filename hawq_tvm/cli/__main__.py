"""`python -m hawq_tvm.cli`: the command without its script."""

import sys

from .main import main

sys.exit(main())
