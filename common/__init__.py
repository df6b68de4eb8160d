"""What clients, strategies and the server share: configuration, data, models, tensors, messages."""
