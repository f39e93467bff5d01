"""Task synthesis."""
