"""Open Inference Protocol v2 with the binary tensor extension, and v1 `:predict`, for KServe and Triton clients.

    reading.py: documents.py (JSON), tensors.py (images) > scoring.py (scores) > outputs.py (reply)

`docs/inference-protocol.md` describes the interface.
"""
