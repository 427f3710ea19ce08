"""Ways to a Jupyter kernel beside the accelerator: started here, found by its connection file, or behind a server."""
