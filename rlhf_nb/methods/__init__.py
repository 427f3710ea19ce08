"""One file a method. A class can be imported without torch; only the worker calls what needs it."""
