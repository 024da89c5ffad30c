"""A plan as source: expressions to lines of code, and the templates that hold the loops."""
