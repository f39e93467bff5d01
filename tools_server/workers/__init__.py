"""Processes for environments whose calls block: they can be killed, which threads cannot."""
