"""``python -m fera_ext`` is ``fera-ext``; without arguments it is ``fera-ext info``."""

import sys

from fera_ext.cli import main

if len(sys.argv) == 1:
    sys.argv.append("info")
main()
