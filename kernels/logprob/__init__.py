"""Log-probabilities of tokens under an unembedding."""
