"""FlexAttention functions as variants: trace a user's score_mod and mask_mod into the language."""
