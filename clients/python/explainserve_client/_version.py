"""Version of the distribution that holds this client."""

from importlib import metadata

try:
    __version__ = metadata.version("explainserve")
except metadata.PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"
