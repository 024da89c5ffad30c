"""The IR: a typed graph of stages over sympy expressions; `graph.py` holds its grammar."""
