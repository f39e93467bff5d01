"""`jorch bench`: what this machine does with a part of jorch, beside what others do with it."""
