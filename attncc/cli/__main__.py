"""`python -m attncc.cli`: the same as `attncc`."""

from attncc.cli import app

app(prog_name="attncc")
