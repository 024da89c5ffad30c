"""FlexAttention's own functions as variants: tracing a user's score_mod and mask_mod into the language."""
