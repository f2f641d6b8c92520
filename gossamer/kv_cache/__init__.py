"""The paged KV cache: host-side page bookkeeping, tensors, and the memory ledger."""
