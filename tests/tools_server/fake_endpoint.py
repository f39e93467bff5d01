"""An OpenAI-compatible endpoint over real HTTP whose answers a test scripts."""

import asyncio
import contextlib
import json

from aiohttp import web


def completion(text, prompt_tokens=100, completion_tokens=10, cached_tokens=0):
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    if cached_tokens:
        usage["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


class Endpoint:
    """`script` is a list of answers, the last one repeated: a completion, a (status, headers, body), or "hang"."""

    def __init__(self, script):
        self.script = list(script)
        self.requests = []
        self.headers = []
        self.at_once = self.most_at_once = 0

    async def answer(self, request):
        self.requests.append(await request.json())
        self.headers.append(request.headers)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            if callable(step):
                step = await step(self.requests[-1])
            if step == "hang":
                await asyncio.sleep(3600)
            if isinstance(step, dict):
                await asyncio.sleep(0.01)
                return web.json_response(step)
            status, headers, body = step
            return web.Response(status=status, headers=headers, body=body)
        finally:
            self.at_once -= 1


@contextlib.asynccontextmanager
async def endpoint(*script):
    """The endpoint and its url."""
    fake = Endpoint(script)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", fake.answer)
    app.router.add_post("/search", fake.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield fake, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def half_json():
    return (200, {"Content-Type": "application/json"}, json.dumps(completion("x")).encode()[:40])
