"""Long measurements with committed results: each one says what was frozen before it ran, and how to run it again."""
