"""Tools behind the server: simulated experts."""
