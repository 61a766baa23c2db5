"""Models on several ranks: where shards lie, whole tensors out of them, and ranks that agree."""
