"""Engines that find passages, behind one protocol (`passages.Retriever`)."""
