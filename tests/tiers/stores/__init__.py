"""The stores that the conformance suite runs over, one module each."""
