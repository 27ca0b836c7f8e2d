"""Score with `httpx`: with_httpx.py PNG KEY CERTIFICATE URL..."""

import ssl
import sys
from pathlib import Path

import httpx

file, key, certificate, *urls = sys.argv[1:]
png = Path(file).read_bytes()
with httpx.Client(headers={"X-API-Key": key}, verify=ssl.create_default_context(cafile=certificate)) as client:
    for url in urls:
        print(client.post(f"{url}/score", content=iter([png]), headers={"Content-Type": "image/png"}).text)
        print(client.post(f"{url}/score", files={"file": png}, data={"alpha": "0.05"}).text)
        print(client.post(f"{url}/score/batch", files=[("files", png), ("files", png)]).text)
