"""What to ask next, how the sides are shown, and what the answers add up to. No Jupyter here."""
