"""The formulas of RLHF as pure functions on torch tensors: no models, no devices, no logging.

Masks are bool and True means that the token counts. What lies under False may be anything, NaN included, and changes
neither a value nor a gradient. Shape suffixes: B rows, T completion tokens, L prompt and completion, V vocabulary, P
prompts, G group.
"""
