"""Which engine serves a request: pure logic, without any import of Triton."""
