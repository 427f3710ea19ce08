"""Sampling completions for training. A backend takes prompts and noise, and gives tokens with their
log-probabilities."""
