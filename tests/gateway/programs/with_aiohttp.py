"""Score with `aiohttp`: with_aiohttp.py PNG KEY CERTIFICATE URL..."""

import asyncio
import ssl
import sys
from pathlib import Path

import aiohttp

file, key, certificate, *urls = sys.argv[1:]
png = Path(file).read_bytes()


async def score() -> None:
    """Send the three requests to each address."""
    connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=certificate))
    async with aiohttp.ClientSession(headers={"X-API-Key": key}, connector=connector) as session:
        for url in urls:
            async with session.post(f"{url}/score", data=png, headers={"Content-Type": "image/png"}) as reply:
                print(await reply.text())
            form = aiohttp.FormData({"alpha": "0.05"})
            form.add_field("file", png, filename="zéro.png", content_type="image/png")
            async with session.post(f"{url}/score", data=form) as reply:
                print(await reply.text())
            form = aiohttp.FormData()
            form.add_field("files", png, filename="a.png")
            form.add_field("files", png, filename="b.png")
            async with session.post(f"{url}/score/batch", data=form) as reply:
                print(await reply.text())


asyncio.run(score())
