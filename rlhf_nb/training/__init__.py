"""What methods share beside the accelerator. Nothing here knows Jupyter."""
