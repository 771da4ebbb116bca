"""A proxy as one writes it first: Starlette before, httpx behind, nothing else."""

from __future__ import annotations

import os

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

client = httpx.AsyncClient(limits=httpx.Limits(max_connections=256, max_keepalive_connections=256), timeout=60)
agent = os.environ["PEER_AGENT"]


async def forward(request: Request) -> Response:
    answer = await client.post(
        f"{agent}{request.url.path}", content=await request.body(), headers={"content-type": "application/json"}
    )
    return Response(answer.content, answer.status_code, {"content-type": answer.headers["content-type"]})


app = Starlette(routes=[Route("/{path:path}", forward, methods=["POST"])])
