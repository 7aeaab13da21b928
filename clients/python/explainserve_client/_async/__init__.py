"""The client over asyncio, written by hand; `_sync` is generated from it by scripts/unasync."""
