"""Behind vLLM: starting it, checking that it computes what the trainer computes, giving it new weights."""
