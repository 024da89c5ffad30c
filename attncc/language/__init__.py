"""What a user writes: a variant of five stages, in Python or as text, read into the IR."""
