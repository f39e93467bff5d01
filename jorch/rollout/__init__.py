"""One coroutine per trajectory; the sampler protocol and its engines; the tool client."""
