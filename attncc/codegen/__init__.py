"""Code generation: expressions to lines of Triton or Gluon, and the Jinja2 templates that hold the loops."""
