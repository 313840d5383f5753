"""Examples and batches of every task."""
