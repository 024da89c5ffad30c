"""What a user writes: a variant of four stages, in Python or as text, read into the IR."""
