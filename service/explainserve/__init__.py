"""ExplainServe: raw feature attributions of compiled models over gRPC.

Start reading at `cli.py`; the README has a map and a reading order.
"""

import os

# onnxruntime's Linux wheels send telemetry unless this is set before their import. No server of ours phones home.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
