"""Write the README's reply and picture from the shipped model's reply to the shipped six."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from app.main import create_app
from app.settings import Settings
from tests.conftest import lifespan

ROOT = Path(__file__).parent.parent
SIX = ROOT / "examples" / "six.png"
BLOCK = re.compile(r"(?<=localhost:8000/score\n).*?(?=\n\$ curl -o)", re.DOTALL)
NAMED = re.compile(r"(?<=reconstruction/)(ID|[0-9a-f]{32,64})(?=\?view)")


async def ask(store: str) -> tuple[dict[str, object], bytes]:
    """Return the reply to the six and its panel."""
    app = create_app(Settings(store_url=f"sqlite:///{store}/reconstructions.db", log_requests=False, device="cpu"))
    async with lifespan(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        reply = (await client.post("/score", files={"file": ("six.png", SIX.read_bytes())})).json()
        return reply, (await client.get(f"{reply['reconstruction']}?view=panel&scale=8")).content


def main() -> None:
    """Request the reply, and write README.md and docs/images/six-panel.png."""
    with TemporaryDirectory() as store:
        reply, panel = asyncio.run(ask(store))
    (ROOT / "docs" / "images" / "six-panel.png").write_bytes(panel)
    lines = [f'"{name}": {json.dumps(value)}' for name, value in reply.items()]
    shown = "{" + ",\n ".join(lines) + "}"
    readme = ROOT / "README.md"
    text = BLOCK.sub(lambda _: shown, readme.read_text())
    readme.write_text(NAMED.sub(str(reply["id"]), text))


if __name__ == "__main__":
    main()
