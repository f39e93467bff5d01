"""Train state, optimizer, token log-probabilities, the train step and the SFT stage."""
