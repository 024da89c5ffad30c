"""Pure functions from the graph to another graph, or to facts that are proved of it."""
