"""The command ``unime``: a thin call of public functions for each of its commands, one module a command."""

from unime_st.cli.main import main

__all__ = ["main"]
