"""Runs the command line as `python -m fptq.cli`."""

import sys

from fptq.cli import main

sys.exit(main())
