"""Runs the command without its entry point: ``python -m unime_st.cli``."""

import sys

from unime_st.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
