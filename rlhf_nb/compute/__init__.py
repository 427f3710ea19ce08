"""From a submitted spec to processes beside the accelerator, and back through the run directory."""
