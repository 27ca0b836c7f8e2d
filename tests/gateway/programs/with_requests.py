"""Score with `requests`: with_requests.py PNG KEY CERTIFICATE URL...

The package reads the certificate from REQUESTS_CA_BUNDLE, which precedes `verify` of a session.
"""

import sys
from pathlib import Path

import requests

file, key, _, *urls = sys.argv[1:]
png = Path(file).read_bytes()
with requests.Session() as session:
    session.headers["X-API-Key"] = key
    for url in urls:
        print(session.post(f"{url}/score", data=png, headers={"Content-Type": "image/png"}).text)
        print(session.post(f"{url}/score", files={"file": Path(file).open("rb")}, data={"alpha": "0.05"}).text)
        print(session.post(f"{url}/score/batch", files=[("files", ("a.png", png)), ("files", ("b.png", png))]).text)
