"""Proof, over random models, texts and splits, that `fast` and `reference` agree."""
