"""Passes: pure functions from a graph to another graph, or to facts that are proved of it."""
