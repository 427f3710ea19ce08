"""Methods that measure and train nothing."""
