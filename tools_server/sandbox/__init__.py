"""Where code that a model wrote runs: bubblewrap processes from a warm pool."""
