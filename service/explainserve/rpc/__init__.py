"""The gRPC surface: the only hand-written code that sees protobuf.

Reading order: `servicer.py` (every RPC), `requests.py` (messages to nouns, with `request_*.py` for its parts),
`responses.py` (answers to messages, with `model_messages.py`, `baseline_messages.py` and `provenance.py`),
`reply_size.py` (what will not fit), `status.py` (errors to status codes), `interceptor.py` (request ids, metrics,
logs), `server.py` (putting it together).
"""
