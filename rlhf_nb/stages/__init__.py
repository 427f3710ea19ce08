"""One verb a file: plain functions, usable without a notebook, called by the Python API and the magics alike."""
