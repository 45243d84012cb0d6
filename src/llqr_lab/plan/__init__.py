"""What a geometry would cost on a network of any size: bytes, operations, messages, on paper."""
