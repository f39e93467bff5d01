"""A server in this process behind real HTTP, and a client of its environment `tools`."""

import asyncio
import contextlib

import aiohttp
from aiohttp import web

from tools_server.app import make_app
from tools_server.config import ServerConfig


class Server:
    def __init__(self, url, http):
        self.url, self.http = url, http

    async def post(self, path, payload):
        async with self.http.post(self.url + path, json=payload) as response:
            answer = await response.json()
            assert response.status == 200, answer
            return answer

    async def open(self, session_id="s", **setup):
        session = {"session_id": session_id, "environment": "tools", "setup": setup, "seed": 3}
        return (await self.post("/v1/sessions", {"sessions": [session]}))["sessions"][0]

    async def calls(self, *calls, session_id="s"):
        items = [
            {"session_id": session_id, "call_id": call_id, "name": name, "arguments": arguments}
            for call_id, name, arguments in calls
        ]
        return (await self.post("/v1/calls", {"calls": items}))["results"]

    async def call(self, call_id, name, **arguments):
        return (await self.calls((call_id, name, arguments)))[0]

    async def finish(self, session_id="s"):
        return (await self.post("/v1/finish", {"session_ids": [session_id]}))["records"][0]


@contextlib.asynccontextmanager
async def serving(tools, **options):
    config = ServerConfig.model_validate({"tools": tools, **options})
    runner = web.AppRunner(make_app(config), access_log=None)
    try:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession() as http:
            yield Server(f"http://127.0.0.1:{runner.addresses[0][1]}", http)
    finally:
        await runner.cleanup()


def run(scenario, tools, **options):
    async def main():
        async with serving(tools, **options) as server:
            return await scenario(server)

    return asyncio.run(main())
