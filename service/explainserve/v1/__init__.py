"""Generated messages and stubs of the proto package explainserve.v1."""
