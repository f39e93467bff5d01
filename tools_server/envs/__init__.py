"""Stateful environments behind the server."""
