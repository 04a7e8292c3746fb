"""`python -m stepfold`."""

import sys

from stepfold.cli import main

sys.exit(main())
