"""`python -m attncc` is the command line."""

from attncc.cli import app

app(prog_name="attncc")
