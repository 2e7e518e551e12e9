"""Send images to a running endpoint and print what it detects.

python examples/call_endpoint.py http://127.0.0.1:8000 photo.jpg ...
"""

import sys

from raydetr.client import Client

endpoint, *files = sys.argv[1:]
with Client(endpoint) as client:  # Client(endpoint, token="...") where the endpoint requires one
    for file in files:
        answer = client.detect(file, threshold=0.5)
        print(f"{file}, {answer.model.name} version {answer.model.version}:")
        for found in answer.detections:
            print(f"  {found.label} {found.score:.2f} {found.box}")
