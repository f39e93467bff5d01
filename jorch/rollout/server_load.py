"""How many requests a vLLM server has, ours and those of others: from its own metrics."""

import re

import aiohttp

PERIOD_S = 2.0
"""Between two looks at a server's metrics."""
_TIMEOUT_S = 5.0
_REQUESTS = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


async def num_requests(http: aiohttp.ClientSession, url: str) -> int | None:
    """Running and waiting, over all engines; None where the server does not say."""
    try:
        async with http.get(url + "/metrics", timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as response:
            found = _REQUESTS.findall(await response.text()) if response.status == 200 else []
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None
    return round(sum(map(float, found))) if found else None
