"""`python -m translora`."""

import sys

from translora.cli import main

sys.exit(main())
