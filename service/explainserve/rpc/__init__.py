"""The gRPC surface: the only hand-written code that sees protobuf.

Reading order: `servicer.py` (every RPC), `requests.py` (messages to nouns), `responses.py` (nouns to messages),
`status.py` (errors to status codes), `interceptor.py` (request ids, metrics, logs), `server.py` (putting it together).
"""
